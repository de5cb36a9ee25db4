"""Triton's interpreter, without the work that it does again for every operation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let the interpreter keep what is the same every time: it then needs a fifth of the time, for the same results."""
    if not hasattr(interpreter, "_LangPatchScope"):  # Another version: it takes its time.
        return
    _patch_once_a_launch()
    _keep_types()
    _keep_agreements()
    options = interpreter.interpreter_builder.options
    if not options.debug:  # Then it computes whether integers overflow, in six operations each, and does not look.
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _patch_once_a_launch() -> None:
    """Every call of a device function replaces all functions of triton.language anew, by the same ones."""
    patch, replaced = interpreter._patch_lang, set[int]()

    @cache
    def modules_of(fn: Any) -> set[int]:
        return {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}

    def patch_once(fn: Any) -> Any:
        modules = modules_of(fn)
        if modules and modules <= replaced:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        replaced.update(modules)
        restore = scope.restore

        def restore_all() -> None:
            replaced.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


def _keep_types() -> None:
    """Every result has a type of its own, with a shape of its own, though neither is ever changed."""
    block_type, tensor, constexpr = tl.core.block_type, tl.core.tensor, tl.core.constexpr
    make_block_type, make_tensor, numpy_dtype = block_type.__init__, tensor.__init__, interpreter._get_np_dtype
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}
    unwrap = tl.core._unwrap_if_constexpr

    def block_type_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[x.value if type(x) is constexpr else x for x in shape])
        known = types.get(key)
        if known is None or type(self) is not block_type:  # Gluon's types add to it.
            make_block_type(self, element_ty, shape)
            if type(self) is block_type:
                types[key] = self.__dict__
        else:
            self.__dict__ = known

    def tensor_init(self: Any, handle: Any, kind: Any) -> None:
        known = shapes.get(kind.name)
        if known is None:
            make_tensor(self, handle, kind)
            shapes[kind.name] = {name: x for name, x in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(known)
            self.handle, self.type = handle, kind

    def known_dtype(kind: Any) -> Any:
        found = dtypes.get(kind.name)
        if found is None:
            found = dtypes[kind.name] = numpy_dtype(kind)
        return found

    def unwrap_if_constexpr(x: Any) -> Any:
        # Most often it is one of these, which the original looks for last.
        if type(x) is int or type(x) is tensor:
            return x
        return x.value if type(x) is constexpr else unwrap(x)

    block_type.__init__, tensor.__init__, interpreter._get_np_dtype = block_type_init, tensor_init, known_dtype
    tl.core._unwrap_if_constexpr = unwrap_if_constexpr


def _keep_agreements() -> None:
    """Before each operation, the types of its two operands are compared, and the smaller one is copied to fill a block.

    What comes out depends on types, and on the value where an operand is a number. numpy needs no copies: an operand
    may keep its small array under the type of the block.
    """
    semantic, tensor = type(interpreter.interpreter_semantic), tl.core.tensor
    check = semantic.binary_op_type_checking_impl
    types: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    numbers: dict[tuple[Any, ...], Any] = {}

    def agree(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        rules = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if type(lhs) is not tensor:
            return check(self, lhs, rhs, *rules)
        if type(rhs) is not tensor:
            key = (lhs.type.name, type(rhs), rhs, rules)
            known = numbers.get(key) if rhs else None  # 0.0 equals -0.0.
            if known is not None:
                return lhs, known
            left, right = check(self, lhs, rhs, *rules)
            if left is lhs:
                numbers[key] = right
            return left, right
        key = (lhs.type.name, rhs.type.name, rules)
        if key in types:
            left_type, right_type = types[key]
            left = lhs if left_type.name == key[0] else tensor(lhs.handle, left_type)
            right = rhs if right_type.name == key[1] else tensor(rhs.handle, right_type)
            return left, right
        left, right = check(self, lhs, rhs, *rules)
        if left.dtype == lhs.dtype and right.dtype == rhs.dtype:
            types[key] = left.type, right.type
        return left, right

    semantic.binary_op_type_checking_impl = agree
