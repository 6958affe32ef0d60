import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.network.graph import ADD, Graph, Operation, evaluate
from common.network.tracing import in_execution_order


def diamond() -> list[Operation]:
    """An input, two convolutions side by side, and their sum."""
    return [
        Operation("x", "input", (), {"shape": [1, 2, 2]}),
        Operation("large", "convolution", ("x",)),
        Operation("small", "convolution", ("x",)),
        Operation("sum", ADD, ("large", "small")),
    ]


def test_operand_with_fewer_weights_runs_first():
    graph = in_execution_order(diamond(), "sum", {"large": 9, "small": 1})
    assert [operation.name for operation in graph.operations] == ["x", "small", "large", "sum"]
    assert graph["sum"].inputs == ("large", "small")
    assert graph.layers == ("small", "large")


def test_what_does_not_lead_to_the_output_is_left_out():
    graph = in_execution_order(diamond(), "small", {"large": 9, "small": 1})
    assert [operation.name for operation in graph.operations] == ["x", "small"]


def test_deep_networks_need_no_recursion():
    chain = [Operation("x0", "input")]
    chain += [Operation(f"x{i}", "relu", (f"x{i - 1}",)) for i in range(1, 5000)]
    assert len(in_execution_order(chain, "x4999", {}).operations) == 5000


def test_users_and_what_depends_on_an_operation():
    graph = Graph(tuple(diamond()))
    assert graph.users["x"] == ("large", "small")
    assert graph.sole_user("x") is None
    assert graph.sole_user("large").name == "sum"
    assert graph.affected_by(["small"]) == {"small", "sum"}


def test_evaluate_runs_what_is_needed_once_and_frees_it():
    computed, alive = [], 0

    class Counted:
        def __init__(self):
            nonlocal alive
            alive += 1

        def __del__(self):
            nonlocal alive
            alive -= 1

    def compute(operation, inputs):
        computed.append((operation.name, alive))
        return Counted()

    chain = [Operation("x", "input")]
    chain += [Operation(f"{i}", "relu", (f"{i - 1}" if i else "x",)) for i in range(6)]
    graph = Graph(tuple(chain))
    found = evaluate(graph, compute, {"1": "known"}, ["5"])
    assert computed == [("2", 0), ("3", 1), ("4", 1), ("5", 1)]
    assert (list(found), alive) == (["5"], 1)
    assert list(evaluate(graph, compute, {"1": "known"}, ["3", "5"])) == ["3", "5"]


def test_json_keeps_everything():
    graph = Graph(tuple(diamond()))
    assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "without operations"),
        (5, "not a graph"),
        ([{"name": "x"}], "not a graph"),
        ([{"name": 1, "kind": "input", "inputs": []}], "not a graph"),
        ([{"name": "x", "kind": "python", "inputs": []}], "unknown kind"),
        ([{"name": "x", "kind": "relu", "inputs": ["x"]}], "before it"),
        ([{"name": "x", "kind": "input", "inputs": []}] * 2, "two operations"),
    ],
)
def test_forged_graphs_are_refused(content, words):
    with pytest.raises(ValueError, match=words):
        Graph.from_json(content)


@given(st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=20))
def test_any_other_json_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"."):
        Graph.from_json(content)
