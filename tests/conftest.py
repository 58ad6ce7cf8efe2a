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


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory) -> Path:
    """A small data set that is learned in seconds."""
    from small_data import make_rectangles
    return make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture()
def no_pictures(monkeypatch) -> None:
    """Trainings draw nothing: it takes as long as small ones do, and is seen in other tests."""
    import training
    monkeypatch.setattr(training, "picture_of_detections", lambda *_: None)
    monkeypatch.setattr(training.visualize, "draw_curves", lambda *_: None)
