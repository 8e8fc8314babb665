import csv
import io
import json

from fxstream.tools.cli import main
from fxstream.tools.document import FORMAT, to_csv, to_json


def test_it_is_the_plan(nested):
    plan, found = nested.compiled.plan, json.loads(to_json(nested.found))
    assert found == nested.found
    assert found["format"] == FORMAT
    assert (found["weight_bytes"], found["input_bytes"]) == (plan.weight_bytes, plan.input_bytes)
    for which, profile in (("before", plan.before), ("after", plan.after)):
        assert found[which]["peak_bytes"] == profile.peak_bytes
        assert tuple(node["live_bytes"] for node in found[which]["nodes"]) == profile.live_bytes
        assert found[which]["nodes"][found[which]["peak_index"]]["live_bytes"] == profile.peak_bytes
    assert [group["name"] for group in found["groups"]] == [group.name for group in plan.groups]
    assert {group["depth"] for group in found["groups"]} >= {0, 1}
    assert all(group["code"] for group in found["groups"])
    assert found["added_flops"] == plan.added_flops


def test_weights_on_disk(capsys):
    assert main(["inspect", "sd-vae", "--small", "--quiet", "--offload", "disk", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fetched"]
    assert found["spilled"]
    read = sum(weight["bytes"] * weight["times"] for weight in found["fetched"])
    assert found["moved_bytes"] == read + sum(value["moved"] for value in found["spilled"])
    assert 0 <= found["resident_weight_bytes"] < found["weight_bytes"]
    names = {node["name"].rpartition("/")[2].partition("_")[0] for node in found["after"]["nodes"]}
    assert {"fetch", "fetched"} <= names


def test_tensors_and_what_is_inside_a_node_make_what_is_live(nested):
    for which in ("before", "after"):
        profile = nested.found[which]
        for position, node in enumerate(profile["nodes"]):
            held = sum(t["bytes"] for t in profile["tensors"] if t["birth"] <= position <= t["death"])
            assert held <= node["live_bytes"]
            inside = node["live_bytes"] - held
            if which == "before":  # no operator of this network but a norm or convolution has memory of its own
                assert inside == 0 or "norm" in node["name"] or node["name"].startswith(("conv", "scaled"))
        assert all(0 <= t["birth"] <= t["death"] < len(profile["nodes"]) for t in profile["tensors"])


def test_what_was_measured(nested):
    eager, captured, streamed = nested.found["measured"]
    assert eager["predicted_bytes"] is None
    for row in (captured, streamed):
        assert abs(row["measured_bytes"] - row["predicted_bytes"]) <= max(2048, 0.01 * row["predicted_bytes"])
    assert streamed["measured_bytes"] < captured["measured_bytes"]
    assert streamed["relative_l2"] < 1e-5


def test_csv_has_a_line_a_node(nested):
    rows = list(csv.DictReader(io.StringIO(to_csv(nested.found))))
    for which in ("before", "after"):
        nodes = [row for row in rows if row["schedule"] == which]
        assert [int(row["live_bytes"]) for row in nodes] == [n["live_bytes"] for n in nested.found[which]["nodes"]]
        assert [row["node"] for row in nodes] == [n["name"] for n in nested.found[which]["nodes"]]
