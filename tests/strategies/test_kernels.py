"""Seconds of single kernels, against hand-computed cases."""

from __future__ import annotations

import pytest

from strategies.kernels import Device, flash_s, gemm_s, misaligned, moved_s

IDEAL = Device(
    linear=100e12,
    half=50e12,
    batched=50e12,
    flash=40e12,
    bandwidth=1e12,
    processors=100,
    depth=0.0,
    wave=0.0,
)


def test_large_products_run_at_the_rate_of_the_device() -> None:
    m = n = k = 12800  # 50 x 100 tiles of 256 x 128: 50 full waves of 100 processors
    assert gemm_s(IDEAL, m, n, k) == pytest.approx(2 * m * n * k / 100e12)
    assert gemm_s(IDEAL, m, n, k, batched=True) == pytest.approx(2 * m * n * k / 50e12)


def test_products_of_thin_matrices_are_bound_by_memory() -> None:
    m, n, k = 16, 10240, 8192
    slow = IDEAL._replace(bandwidth=1e11)
    assert gemm_s(slow, m, n, k) == pytest.approx(2 * (m * k + k * n + m * n) / 1e11)
    assert gemm_s(slow._replace(itemsize=1.0), m, n, k) == pytest.approx((m * k + k * n + m * n) / 1e11)


def test_the_last_wave_costs_what_the_device_loses_of_it() -> None:
    lossy = IDEAL._replace(wave=1.0, processors=64)
    full = gemm_s(lossy, 2048, 1024, 65536)  # 64 tiles: one full wave
    assert gemm_s(lossy, 2048 + 256, 1024, 65536) > 1.2 * full
    assert gemm_s(lossy._replace(wave=0.0), 2048 + 256, 1024, 65536) == pytest.approx(full * 9 / 8)


def test_start_and_end_of_tiles_cost_as_much_as_some_depth() -> None:
    deep = IDEAL._replace(depth=256.0)
    assert gemm_s(deep, 12800, 12800, 256) == pytest.approx(2 * gemm_s(IDEAL, 12800, 12800, 256), rel=0.2)


def test_copies_are_independent_products() -> None:
    assert gemm_s(IDEAL, 12800, 12800, 1280, 7) == pytest.approx(7 * gemm_s(IDEAL, 12800, 12800, 1280))


@pytest.mark.parametrize(("size", "slower"), [(64, 1.0), (4096, 1.0), (32, 7 / 6), (1800, 1.5), (225, 2.0), (0.5, 2.0)])
def test_rows_that_are_not_aligned_are_slower(size: float, slower: float) -> None:
    assert misaligned(size) == pytest.approx(slower)


def test_misalignment_shows_in_products() -> None:
    assert gemm_s(IDEAL, 12800, 12801, 12800) > 1.9 * gemm_s(IDEAL, 12800, 12800, 12800)


def test_products_never_get_faster_when_they_grow() -> None:
    real = IDEAL._replace(depth=64.0, wave=0.1)
    for size in (64, 640, 6400):
        assert gemm_s(real, 2 * size, size, size) >= gemm_s(real, size, size, size)
        assert gemm_s(real, size, size, 2 * size) >= gemm_s(real, size, size, size)


def test_tokens_get_cheaper_in_larger_products() -> None:
    real = IDEAL._replace(depth=64.0, wave=0.1)
    per_token = [gemm_s(real, tokens, 4096, 4096) / tokens for tokens in (256, 2048, 16384, 131072)]
    assert per_token == sorted(per_token, reverse=True)


def test_flash_attention_prefers_wide_heads_and_long_sequences() -> None:
    long = flash_s(IDEAL, 1e12, 128, 1_000_000)
    assert long == pytest.approx(1e12 / 40e12, rel=1e-3)
    assert flash_s(IDEAL, 1e12, 64, 1_000_000) > long
    assert flash_s(IDEAL, 1e12, 128, 512) > 1.4 * long


def test_memory_bound_work_is_bytes_over_bandwidth() -> None:
    assert moved_s(IDEAL, 3e12) == 3.0
