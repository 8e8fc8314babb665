import re

from fxstream.tools.dot import to_dot


def test_a_frame_for_each_loop_and_a_box_for_each_module(nested):
    dot = to_dot(nested.compiled)
    assert dot.startswith("digraph plan {")
    assert dot.count("{") == dot.count("}")
    for group in nested.compiled.plan.groups:
        assert f'subgraph "cluster_{group.name}"' in dot
    for path in filter(None, set(nested.compiled.plan.before.module_paths)):
        assert f'label="{path}\\n' in dot


def test_edges_join_boxes(nested):
    dot = to_dot(nested.compiled)
    boxes = set(re.findall(r"^ +(box_\d+) \[", dot, re.MULTILINE))
    edges = re.findall(r"^  (box_\d+) -> (box_\d+) ", dot, re.MULTILINE)
    assert edges
    assert all(a in boxes and b in boxes and a != b for a, b in edges)
    assert len({*edges}) == len(edges)
    reached = {b for _, b in edges}
    assert len(reached) >= len(boxes) - 3  # all but the first, and what reads inputs alone
