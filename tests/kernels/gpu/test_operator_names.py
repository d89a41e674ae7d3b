"""Operators of a copy register under plain ASCII, and two copies under different names."""

import pytest
import torch

from kimi_linear.kernels.gpu.operator_names import operator_namespace


@pytest.mark.parametrize("folder", ["kimi-48b", "Größe", "模型", "kimi.v2", "кими"])
def test_operators_of_a_folder_with_any_name_register(folder):
    @torch.library.custom_op(
        f"{operator_namespace('test', f'transformers_modules.{folder}.moe')}::twice", mutates_args=()
    )
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert twice(torch.ones(1)) == 2


def test_letters_beyond_ascii_keep_folders_apart():
    assert len({operator_namespace("test", name) for name in ("a", "ä", "á", "模", "型")}) == 5
    assert operator_namespace("kimi", "package.room.file") == "kimi_package_room_file"
