"""The counting in a chat template: calls that jinja2 compiles into it."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import nodes
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END as CONTROL_TOKEN_END
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as CONTROL_TOKEN_START

_NODES_PER_STEP = 16
_STEPS_OF_MARK = 1000
_MARKED = re.compile(f"{CONTROL_TOKEN_START}[^{CONTROL_TOKEN_START}{CONTROL_TOKEN_END}\n]*{CONTROL_TOKEN_END}")
_METERED, _COUNTED, _WRITTEN = "_metered", "_counted", "_written"


@pass_context
def _metered(context: Any, value: Any) -> Any:
    """Return `value`, which is about to be joined, compared or cut."""
    if isinstance(value, str):
        context.budget.require(len(value))
    else:
        context.budget.measure(value)
    return value


@pass_context
def finalize(context: Any, value: Any) -> Any:
    """Return `value`, which is about to be written."""
    context.budget.write(len(value) if isinstance(value, str) else context.budget.measure(value).characters)
    if isinstance(value, str) and CONTROL_TOKEN_START in value:
        # transformers looks for the end of each of these marks, and so reads all that follows for one without an end.
        context.budget.charge(_STEPS_OF_MARK * (value.count(CONTROL_TOKEN_START) - len(_MARKED.findall(value))))
    return value


@pass_context
def _counted(context: Any, steps: int) -> bool:
    context.budget.charge(steps)
    return True


@pass_context
def _written(context: Any, characters: int) -> None:
    context.budget.write(characters)


COUNTING = {_METERED: _metered, _COUNTED: _counted, _WRITTEN: _written}
"""Filters that no template is written with: those of the calls below."""


class Metering(NodeTransformer):
    """Puts the counting into a template: where it does something again and again, writes a text of its own, or joins,
    compares or cuts values."""

    def _counts(self, node: Any) -> nodes.Node:
        size = 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_PER_STEP
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_COUNTED, nodes.Const(size, lineno=node.lineno)), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:  # it is asked of items that are left out too
            one = _call(_COUNTED, nodes.Const(1, lineno=node.lineno))
            node.test = nodes.And(one, node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _counts  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:  # noqa: N802
        self.generic_visit(node)
        length = sum(len(each.data) for each in node.nodes if isinstance(each, nodes.TemplateData))
        if not length:
            return [node]
        return [nodes.ExprStmt(_call(_WRITTEN, nodes.Const(length, lineno=node.lineno)), lineno=node.lineno), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_call(_METERED, each) for each in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _call(_METERED, node.expr)
        for operand in node.ops:
            operand.expr = _call(_METERED, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call(_METERED, node.node)
        return node


def _call(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
