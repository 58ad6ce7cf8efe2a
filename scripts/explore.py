#!/usr/bin/env python3
"""Look at what a detector sees, in the browser: boxes, attention, errors.

    python scripts/explore.py --resume CKPT --coco_path DIR
    python scripts/explore.py --resume CKPT --data DIR --split test
    python scripts/explore.py --resume CKPT                                 # uploads alone

The page shows the images of a data set, in any format that --data takes, by name or by errors, the worst first, and
images that are uploaded; boxes above a threshold that moves; where the query behind a box looked, head by head and layer
by layer, and how its box moved; where the encoder looks from a point; and the ground truth with the kinds of errors.

Needs Starlette and uvicorn: pip install -e '.[explore]'. The server listens on this machine alone unless --host says
otherwise, reads images of the data set and its own page and no other file, and writes none. From another machine:
ssh -L 8000:127.0.0.1:8000 MACHINE, then open http://127.0.0.1:8000 here.
"""
from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets import build_dataset
from datasets.coco import CocoDetection
from datasets.formats import ROBOFLOW
from detr.loading import Detector
from detr.loading import load as load_detector
from detr.presets import PRESETS

NEEDED = ("starlette", "uvicorn")
PORT = 8000


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint, path or URL")
    parser.add_argument("--model", metavar="NAME", help="preset of a checkpoint that holds weights alone; default: "
                        f"detr_resnet50 where its shapes fit. One of {', '.join(PRESETS)}")
    parser.add_argument("--coco_path", metavar="DIR", help="data in COCO's layout")
    parser.add_argument("--data", metavar="PATH", help="data in any format: a folder, or the file that describes it")
    parser.add_argument("--split", choices=("train", "val", "test"), help="part of the data (default: val)")
    parser.add_argument("--images_in", action="append", default=[], metavar="DIR", help="a further folder that images of "
                        "the data may lie in, where links or its own files lead out of its folder; may be repeated")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a box, at first, and of what counts "
                        "as an error in the order of images (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine "
                        "alone)")
    parser.add_argument("--port", type=int, default=PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", help="'cuda', 'mps', 'cpu' (default: the first of them that is there)")
    return parser


def open_data(args: argparse.Namespace, detector: Detector) -> tuple[CocoDetection | None, list[Path]]:
    """The data set, if any, and the folders that its images may lie in: the one that was given, and --images_in."""
    given = args.data if args.data is not None else args.coco_path
    if given is None:
        for flag, value in (("--images_in", next(iter(args.images_in), None)), ("--split", args.split)):
            if value is not None:
                raise ValueError(f"{flag} {value} is about the images of a data set; give --data or --coco_path too")
        return None, []
    dataset = build_dataset(args.split or "val", args.coco_path, data=args.data, categories=detector.categories,
                            channels=detector.channels)
    folder = Path(given).resolve()
    roots = [home_of(folder), *(Path(root).resolve() for root in args.images_in)]
    for root in roots[1:]:
        if not root.is_dir():
            raise FileNotFoundError(f"--images_in {root}: there is no such folder")
    within = dataset.image_folder.resolve()
    if not any(within.is_relative_to(root) for root in roots):
        raise ValueError(f"the images are in {within}, which is outside of {roots[0]}; nothing outside of what is given "
                         f"is read, so add --images_in {within} if they are meant")
    return dataset, roots


def home_of(given: Path) -> Path:
    """The folder of a data set that is given as itself, or as the file or folder in it that says what is on images."""
    folder = given if given.is_dir() else given.parent
    return folder.parent if folder.name.lower() == "annotations" or given.name == ROBOFLOW else folder


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server. Raises OSError where the port is taken or the address is not this machine's."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port}: 0 to 65535, 0 takes a free one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}; --port 0 takes a free port, and --host "
                      f"an address of this machine") from error


def server_of(app: Any) -> Any:
    """What serves ``app`` on a socket: ``run(sockets=[opened])``."""
    import uvicorn
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, limit_concurrency=64,
                                         timeout_graceful_shutdown=5))


def main(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the page needs {' and '.join(missing)}: pip install -e '.[explore]'")
    from explore_page.images import Images
    from explore_page.server import is_loopback, make_app
    from explore_page.sight import Sight

    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: scores are between 0 and 1")
    if args.coco_path is not None and args.data is not None:
        raise ValueError("--coco_path and --data name a data set each; give one of them")
    device = command_line.choose_device(args.device or "cuda", args.device is not None)
    detector = load_detector(args.resume, model=args.model)
    dataset, roots = open_data(args, detector)
    detector.to(device)
    images = Images(dataset, roots, detector.channels)
    sight = Sight(detector, images, args.threshold)
    app: Any = make_app(sight, images, args.host, data="" if dataset is None else dataset.annotation_file.name)
    with listen(args.host, args.port) as opened:
        port = opened.getsockname()[1]
        if not is_loopback(args.host):
            print(f"--host {args.host}: whoever reaches this machine's port {port} sees the images of the data set and "
                  f"all uploads, and can have the model work; there is no password", flush=True)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(f"model: {detector.name}; images: {len(images.by_name)}; device: {device}; page: http://{shown}:{port}",
              flush=True)
        server_of(app).run(sockets=[opened])


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
