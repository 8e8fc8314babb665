import re

from fxstream.tools.listing import listing, loop_listings


def test_every_operator_has_a_line(nested):
    program = listing(nested.compiled.graph_module)
    assert program.startswith("def forward(")
    assert program.rstrip().splitlines()[-1].startswith("    return ")
    nodes = [node for node in nested.compiled.plan.after.nodes if "loop_" not in node and "getitem" not in node]
    for name in nodes:
        assert re.search(rf"^ +{name} = ", program, re.MULTILINE), name


def test_loops_are_nested_and_weights_go_by_their_paths(nested):
    program = listing(nested.compiled.graph_module)
    outer = re.search(r"^    for i in slices\((\d+) x 1\):", program, re.MULTILINE)
    inner = re.search(r"^        for j in slices\(", program, re.MULTILINE)
    assert outer and inner and outer.start() < inner.start()
    paths = {name for name, _ in nested.target.model.named_parameters()}
    assert sum(path in program for path in paths) == len(paths)


def test_a_listing_for_each_loop(nested):
    listings = loop_listings(nested.compiled.graph_module)
    assert list(listings) == [group.name for group in nested.compiled.plan.groups]
    for group in nested.compiled.plan.groups:
        code = listings[group.name]
        assert f"{group.slices} x " in code or len(set(group.lengths)) > 1
        if group.depth:
            assert re.search(rf"^    {group.first}(_\w+)? = ", code, re.MULTILINE), group.name  # or its parts
    outer = listings["loop_0"]
    inner = next(name for name in listings if name.startswith("loop_0/")).removeprefix("loop_0/")
    assert f"    {inner} = {inner}(" in outer  # one line there
