"""Fixtures that several test files share."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                   # engine, main, datasets are a checkout, not a package


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds ``coco_mini/`` and ``bccd/``; tests that want real images skip without it."""
    folder = Path(os.environ.get("DETR_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "coco_mini").is_dir():
        pytest.skip(f"no real images: {folder / 'coco_mini'} is not there (DETR_TEST_DATA names another folder)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Reports of data checks stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
