"""A function of an operator by Lanczos, against its dense eigen-decomposition."""

import pytest
import torch

from stagewise.sampling import krylov


def operator(size=60, low=-2.0, high=30.0):
    random = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
    values = torch.cat([torch.linspace(low, 1, size // 2), torch.linspace(1, high, size - size // 2)]).double()
    return vectors * values @ vectors.T, vectors, values


def growth(values):
    return (values / 8).neg().exp()


def rows(size=60, count=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def applied(matrix, tolerance=1e-8):
    return krylov.applied(growth, lambda v: v @ matrix, rows(len(matrix)), tolerance)


@pytest.mark.parametrize("stored", [2**22, 0])
def test_it_is_the_dense_function_whether_the_vectors_are_kept_or_made_again(stored, monkeypatch):
    monkeypatch.setattr(krylov, "STORED", stored)
    matrix, vectors, values = operator()
    expected = rows() @ (vectors * growth(values)) @ vectors.T
    assert (applied(matrix) - expected).norm() < 1e-6 * expected.norm()


def test_the_tolerance_is_that_of_the_answer_and_saves_products():
    matrix, vectors, values = operator()
    expected, products = rows() @ (vectors * growth(values)) @ vectors.T, []

    def product(v):
        products.append(len(v))
        return v @ matrix

    rough = krylov.applied(growth, product, rows(), 1e-2)
    few = len(products)
    krylov.applied(growth, product, rows(), 1e-8)
    assert few < len(products) - few
    assert ((rough - expected).norm(dim=1) < 1e-2 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3).double(), torch.diag(torch.tensor([5.0, 0, 0, 0]).double())])
def test_fewer_directions_than_steps_are_no_trouble(matrix):
    expected = rows(len(matrix)) @ torch.diag(growth(matrix.diagonal()))
    torch.testing.assert_close(applied(matrix), expected)


def test_what_does_not_settle_is_refused(monkeypatch):
    monkeypatch.setattr(krylov, "_MOST", 8)
    with pytest.raises(ValueError, match="8 products with the curvature do not tell .* use a shorter window"):
        applied(operator()[0])
