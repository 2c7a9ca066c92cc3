"""Claims about the package itself."""

import lfm_mlx.sampling


def test_all_names_exist_and_stand_once():
    names = lfm_mlx.sampling.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(lfm_mlx.sampling, name) for name in names)
