"""`wanda_kernels` offers the names of `__all__`, and `help()` of each explains it completely."""

import inspect

import pytest

import wanda_kernels
from wanda_kernels import forward

FUNCTIONS = [name for name in wanda_kernels.__all__ if inspect.isfunction(getattr(wanda_kernels, name))]


@pytest.mark.parametrize("module", [wanda_kernels, forward])
def test_every_name_is_there_and_documented(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in set(module.__all__) - {"OPERATIONS"}:
        assert inspect.getdoc(getattr(module, name)), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_annotated_and_documented(name):
    function = getattr(wanda_kernels, name)
    signature, text = inspect.signature(function), inspect.getdoc(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.name in text, f"{name} does not document {parameter.name}"


@pytest.mark.parametrize("name", [*wanda_kernels.OPERATIONS, "factor_hessian", "add_hessian_on_host_"])
def test_an_operation_states_errors_and_source(name):
    text = inspect.getdoc(getattr(wanda_kernels, name))
    assert all(f"\n{heading}: " in text for heading in ("Raises", "Source"))
    assert "Args:" in text and "in place" in text or name == "factor_hessian"
