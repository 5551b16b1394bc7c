"""Reads source for what would make the host wait for a GPU; ``tests/kernels/nosync.py`` is its twin for what runs.

The mode sees what a test runs, on the path that the test takes; this reads each line, also those that only a GPU runs.
It knows a tensor by the annotation of an argument and by what is computed from one: enough for what people write,
no proof.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

# Give the host data, or a shape that depends on data.
READING_METHODS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
    "bincount", "equal", "allclose", "new_tensor", "is_nonzero", "synchronize", "storage",
}  # fmt: skip
READING_FUNCTIONS = READING_METHODS | {"tensor", "as_tensor", "from_numpy", "asarray"}
# Of a tensor, and not one.
HOST_ATTRIBUTES = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "grad_fn", "names",
}  # fmt: skip
HOST_METHODS = {
    "dim", "numel", "size", "stride", "is_contiguous", "data_ptr", "element_size", "is_floating_point", "is_complex",
    "storage_offset", "get_device", "nelement", "is_pinned", "untyped_storage", "is_inference",
}  # fmt: skip
CREATING_FUNCTIONS = {"arange", "zeros", "ones", "full", "empty", "empty_like", "zeros_like", "ones_like", "linspace"}
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not", "isfinite", "isnan"}


class Finding(NamedTuple):
    """``what`` would wait, in ``function`` (its qualified name) at ``line``."""

    function: str
    line: int
    what: str


def _is_tensor(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in ("Tensor", "torch.Tensor", "Tensor | None")


class _Function(ast.NodeVisitor):
    """Walks one function; functions inside it share what it knows of names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: set[str] = set()
        self.masks: set[str] = set()
        self.found: list[Finding] = []

    def report(self, node: ast.AST, what: str) -> None:
        self.found.append(Finding(self.name, node.lineno, what))  # type: ignore[attr-defined]

    def tensor(self, node: ast.expr) -> bool:
        """Whether the expression is a tensor, as far as can be seen."""
        match node:
            case ast.Name(id=name):
                return name in self.tensors
            case ast.Attribute(value=value, attr=attribute):
                return attribute not in HOST_ATTRIBUTES and self.tensor(value)
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.UnaryOp(operand=value):
                return not isinstance(getattr(node, "op", None), ast.Not) and self.tensor(value)
            case ast.BinOp(left=left, right=right):
                return self.tensor(left) or self.tensor(right)
            case ast.Compare(left=left, ops=ops, comparators=others):
                by_identity = all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in ops)
                return not by_identity and any(map(self.tensor, [left, *others]))
            case ast.IfExp(body=body, orelse=orelse):
                return self.tensor(body) or self.tensor(orelse)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                return name in CREATING_FUNCTIONS or any(map(self.tensor, node.args))
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                return name not in HOST_METHODS and self.tensor(value)
        return False

    def mask(self, node: ast.expr) -> bool:
        """Whether the expression is a tensor of bools, as far as can be seen."""
        match node:
            case ast.Name(id=name):
                return name in self.masks
            case ast.Compare():
                return self.tensor(node)
            case ast.UnaryOp(op=ast.Invert(), operand=value):
                return self.mask(value)
            case ast.BinOp(left=left, right=right, op=ast.BitAnd() | ast.BitOr() | ast.BitXor()):
                return self.mask(left) or self.mask(right)
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                return (name in COMPARISONS or name in ("any", "all", "bool")) and (
                    self.tensor(value) or any(map(self.tensor, node.args))
                )
            case ast.Subscript(value=value):
                return self.mask(value)
        return False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return  # runs on the device
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.tensors |= {argument.arg for argument in arguments if _is_tensor(argument.annotation)}
        for statement in node.body:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(names)
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name):
                    for known, now in ((self.tensors, self.tensor(value)), (self.masks, self.mask(value))):
                        (known.add if now else known.discard)(name.id)

    def _condition(self, test: ast.expr) -> None:
        parts = test.values if isinstance(test, ast.BoolOp) else [test]
        for part in parts:
            if isinstance(part, ast.BoolOp):
                self._condition(part)
                continue
            inner = part.operand if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not) else part
            if self.tensor(inner):
                self.report(part, f"a condition on a tensor: {ast.unparse(part)}")

    def visit_If(self, node: ast.If) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            if self.mask(index):
                self.report(node, f"indexing by a mask: {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        text = ast.unparse(node)
        match node.func:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in READING_FUNCTIONS:
                self.report(node, text)
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch")), attr="synchronize"):
                self.report(node, text)
            case ast.Attribute(attr="where") if len(node.args) == 1 and not node.keywords:
                self.report(node, f"where of one argument: {text}")
            case ast.Attribute(attr="repeat_interleave") if all(k.arg != "output_size" for k in node.keywords):
                self.report(node, f"without output_size: {text}")
            case ast.Attribute(attr="to"):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                if any("cpu" in ast.unparse(value).strip("'").split("'") for value in values):
                    self.report(node, text)
            case ast.Attribute(value=value, attr=name) if name in READING_METHODS:
                # A namespace of that name (np.unique, dict.item) is not a tensor; anything else may be.
                if not (isinstance(value, ast.Name) and value.id in ("np", "math", "os")):
                    self.report(node, text)
            case ast.Name(id="bool" | "int" | "float" as name) if node.args and self.tensor(node.args[0]):
                self.report(node, f"{name} of a tensor: {text}")
        self.generic_visit(node)


def findings(source: str) -> Iterator[Finding]:
    """What would wait in each function of a module's source, in its order."""

    def functions(body: list[ast.stmt], prefix: str) -> Iterator[Finding]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                walk = _Function(prefix + node.name)
                walk.visit(node)
                yield from walk.found

    yield from functions(ast.parse(source).body, "")
