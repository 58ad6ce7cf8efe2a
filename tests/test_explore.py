"""The server of ``scripts/explore.py``: what it says is what the detector says, and what it refuses."""
import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from small_data import damaged, make_rectangles, read_annotations, write_annotations

import detr
from datasets.errors import KINDS, judge
from datasets.fast_coco_eval import Found
from detr.attention_maps import explain
from detr.boxes import box_cxcywh_to_xyxy
from detr.deformable_attention import MSDeformAttn
from detr.preprocessing import Preprocessing
from detr.presets import PRESETS
from detr.run_folder import RunFolder

uvicorn = pytest.importorskip("uvicorn", reason="no uvicorn: pip install -e '.[explore]'")
pytest.importorskip("starlette", reason="no Starlette: pip install -e '.[explore]'")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TABLE = [{"label": 0, "id": 3, "name": "red"}, {"label": 1, "id": 7, "name": "blue"}]
DENSE, DEFORMABLE = "tiny_detr", "tiny_deformable_detr"
FIRST = 200                                             # id of the first validation image


def load_script():
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("explore", SCRIPTS / "explore.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["explore"] = module
    spec.loader.exec_module(module)
    return module


def make_checkpoint(folder: Path, name: str) -> Path:
    """Random weights whose scores are between 0.1 and 0.9, and whose attention is not everywhere alike."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name].model, num_queries=12)
    model = config.build(len(TABLE))[0]
    with torch.no_grad():
        for part, module in model.named_modules():
            if "class_embed" in part and isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, 0.2)
                module.bias.normal_(0, 0.7)
            elif isinstance(module, MSDeformAttn):
                module.sampling_offsets.weight.normal_(0, 0.1)
                module.attention_weights.weight.normal_(0, 0.3)
            elif part.endswith(("self_attn", "multihead_attn")):
                module.in_proj_weight.mul_(4)
    RunFolder(folder).export("best", {
        "model": model.state_dict(), "categories": TABLE, "num_classes": len(TABLE), "epoch": 1, "card": {},
        "config": {"name": name, "model": dataclasses.asdict(config), "train": {},
                   "data": {"dataset_file": "coco", "image_size": "96x128", "max_size": None}},
        "preprocessing": Preprocessing((96, 128), None).as_dict()})
    return folder / "best.pth"


@contextlib.contextmanager
def serving(checkpoint: Path, data: Path | None, *more: str):
    """A server on a free port. Gives the port and what answers."""
    script = load_script()
    from explore_page.images import Images
    from explore_page.server import make_app
    from explore_page.sight import Sight
    given = ["--coco_path", str(data)] if data is not None else []
    args = script.get_args_parser().parse_args(["--resume", str(checkpoint), *given, *more])
    detector = detr.load(checkpoint)
    dataset, roots = script.open_data(args, detector)
    images = Images(dataset, roots, detector.channels)
    sight = Sight(detector, images, args.threshold)
    opened = script.listen("127.0.0.1", 0)
    server = script.server_of(make_app(sight, images, args.host))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield opened.getsockname()[1], sight
    finally:
        server.should_exit = True
        thread.join(20)
        opened.close()


def ask(port: int, target: str, method: str = "GET", body=None, **headers: str) -> tuple[int, dict, bytes]:
    """Status, headers and content, of a request exactly as written."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, target, skip_host="host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None and "content_length" not in headers:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def get(port: int, target: str) -> dict:
    status, _, content = ask(port, target)
    assert status == 200, content
    return json.loads(content)


def refusal(port: int, target: str, status: int, method: str = "GET", body=None, **headers: str) -> str:
    """The line of a request that is refused so."""
    got, head, content = ask(port, target, method, body, **headers)
    assert got == status and head["content-type"] == "application/json", (got, content)
    said = json.loads(content)
    assert list(said) == ["error"] and said["error"] and "\n" not in said["error"]
    return said["error"]


def png(width: int = 60, height: int = 40, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(1).randint(0, 255, (height, width, 3)).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has a few bytes of them."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven validation images, the first of which has a crowd."""
    folder = make_rectangles(tmp_path_factory.mktemp("explored") / "data")

    def add_crowd(content):
        content["annotations"].append({"id": 1, "image_id": FIRST, "category_id": 7, "bbox": [40, 2, 30, 60],
                                       "area": 1800, "iscrowd": 1})
    write_annotations(folder, "val", damaged(read_annotations(folder, "val"), add_crowd))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name) for name in (DENSE, DEFORMABLE)}


@pytest.fixture(scope="module", params=[DENSE, DEFORMABLE])
def served(request, checkpoints, data):
    with serving(checkpoints[request.param], data) as (port, sight):
        yield port, sight, detr.load(checkpoints[request.param]), data


@pytest.fixture(scope="module")
def dense(checkpoints, data):
    with serving(checkpoints[DENSE], data) as (port, sight):
        yield port, sight


# What it says.

def test_images(dense):
    port, _ = dense
    about, listed = get(port, "/api/about"), get(port, "/api/images")
    assert about["images"] == 7 and about["encoder_layers"] == 1 and about["model"] == DENSE
    assert about["colours"] == {"0": "#0072b2", "1": "#e69f00"}                 # as in every other picture
    assert about["kinds"]["class"] == {"letter": "C", "colour": "#56b4e9", "words": "wrong class"}
    assert set(about["kinds"]) == {*KINDS, "missed"}
    assert [row["id"] for row in listed["images"]] == [str(FIRST + i) for i in range(7)] and listed["pages"] == 1
    assert listed["images"][0] == {"id": "200", "name": "200.png", "width": 72, "height": 64, "errors": None,
                                   "looked_at": False}
    for what, size in (("picture", (72, 64)), ("thumbnail", (72, 64))):
        status, headers, content = ask(port, f"/api/images/203/{what}")
        assert status == 200 and headers["content-type"] in ("image/png", "image/jpeg")
        assert Image.open(io.BytesIO(content)).size == size
    assert get(port, "/api/images/200/neighbour?step=1") == {"id": "201"}
    assert get(port, "/api/images/206/neighbour?step=1") == {"id": None}
    assert "page=x: a number is needed" in refusal(port, "/api/images?page=x", 400)
    assert "one of name, error" in refusal(port, "/api/images?sort=size", 400)


def test_detections_are_the_detectors(served):
    port, _, detector, data = served
    for i in (0, 3):
        said = get(port, f"/api/images/{FIRST + i}/detections")
        want, = detector(data / "val2017" / f"{FIRST + i}.png")
        order = want["scores"].argsort(descending=True, stable=True)
        assert [one["score"] for one in said["detections"]] == want["scores"][order].tolist()
        assert [one["box"] for one in said["detections"]] == want["boxes"][order].tolist()
        assert [one["name"] for one in said["detections"]] == [want["names"][k] for k in order.tolist()]
        assert 0.1 < said["detections"][-1]["score"] + 0.1 < said["detections"][0]["score"]     # a threshold would matter
        rows = [row for row in read_annotations(data, "val")["annotations"] if row["image_id"] == FIRST + i]
        assert [one["box"] for one in said["truth"]] == [[x, y, x + w, y + h] for x, y, w, h in
                                                         (row["bbox"] for row in rows)]
        assert [one["crowd"] for one in said["truth"]] == [bool(row["iscrowd"]) for row in rows]
        assert [{"red": 3, "blue": 7}[one["name"]] for one in said["truth"]] == [row["category_id"] for row in rows]


def explained(detector, data, i=0):
    with Image.open(data / "val2017" / f"{FIRST + i}.png") as image:
        picture = image.convert("RGB")
    return explain(detector.model, detector.preprocessing(picture), (picture.height, picture.width))


def maps_of(layer: dict) -> np.ndarray:
    """``[M + 1, h, w]`` weights: the average and each head's, to 1 / 510 of the largest."""
    values = np.frombuffer(base64.b64decode(layer["heat"]), np.uint8).reshape(-1, *layer["shape"])
    return values / 255 * np.array(layer["most"])[:, None, None]


def test_where_a_query_looked(served):
    port, _, detector, data = served
    seen, height, width = explained(detector, data), 64, 72
    for detection in get(port, f"/api/images/{FIRST}/detections")["detections"][:3]:
        query = detection["query"]
        said = get(port, f"/api/images/{FIRST}/query/{query}")
        assert np.allclose(said["path"][-1], detection["box"], atol=0.01)       # it is the query of this box
        assert len(said["path"]) == 3 and said["from_box"] and len(said["layers"]) == 2         # both start from boxes
        start = box_cxcywh_to_xyxy(seen.references[0][query]) * torch.tensor([width, height] * 2)
        assert np.allclose(said["path"][0], start, atol=0.01) and np.allclose(said["references"][0], start, atol=0.01)
        for k, layer in enumerate(said["layers"]):
            maps, attention = maps_of(layer), seen.decoder[k]
            assert len(maps) == 5
            for head in range(4):
                want = seen.heat(query, k, head).numpy()
                assert maps[head + 1].shape == want.shape
                assert np.abs(maps[head + 1] - want).max() <= want.max() * 0.003
            assert np.allclose(maps[0], maps[1:].mean(0), atol=maps[1:].max() * 0.006)
            if detector.name == DEFORMABLE:
                points = np.array(layer["points"])                              # [M, L * P, 4]
                assert np.abs(points[..., 2].sum(1) - 1).max() < 2e-3
                assert np.abs(points[..., :2] - attention.points[query].flatten(1, 2).numpy()).max() < 0.051
            else:
                assert "points" not in layer and np.abs(maps.sum((1, 2)) - 1).max() < 0.05
    assert "no query 99; the model has" in refusal(port, f"/api/images/{FIRST}/query/99", 404)


def test_where_the_encoder_looks(served):
    port, _, detector, data = served
    address = f"/api/images/{FIRST}/point"
    if detector.name == DEFORMABLE:
        assert "no encoder layers" in refusal(port, f"{address}?x=50&y=10", 422)
        return
    layer, = get(port, f"{address}?x=50.5&y=10")["layers"]
    want = explained(detector, data).encoder_heat(50.5, 10, head=2).numpy()
    assert np.abs(maps_of(layer)[3] - want).max() <= want.max() * 0.003
    other, = get(port, f"{address}?x=3&y=60")["layers"]
    assert other["heat"] != layer["heat"]
    assert "not in the image" in refusal(port, f"{address}?x=72&y=10", 422)
    for wrong in ("x=nan&y=1", "x=1", "x=1e99&y=1", "x=a&y=1"):
        assert "a number is needed" in refusal(port, f"{address}?{wrong}", 400)


def test_deformable_encoders(tmp_path, data, checkpoints):
    """Where each token has sampling points."""
    path = make_checkpoint_with(tmp_path, DEFORMABLE, enc_layers=2)
    with serving(path, data) as (port, _):
        said = get(port, f"/api/images/{FIRST}/point?x=50&y=10")
    attention = explained(detr.load(path), data).encoder
    assert len(said["layers"]) == 2
    row, column = int(10 / 64 * 12), int(50 / 72 * 16)                          # of the finest map, of stride 8
    for layer, want in zip(said["layers"], attention):
        assert np.allclose(np.array(layer["points"])[..., :2], want.points[row * 16 + column].flatten(1, 2), atol=0.051)


def make_checkpoint_with(folder: Path, name: str, **changes) -> Path:
    """``make_checkpoint`` of a preset with other settings."""
    before = PRESETS[name]
    PRESETS[name] = dataclasses.replace(before, model=dataclasses.replace(before.model, **changes))
    try:
        return make_checkpoint(folder, name)
    finally:
        PRESETS[name] = before


def test_a_list_is_of_one_moment(dense, monkeypatch):
    """What becomes known while a list is written is for the next list."""
    port, sight = dense
    row = type(sight.images).row

    def looked_at_meanwhile(images, key):
        sight.errors[key] = 1
        return row(images, key)

    monkeypatch.setattr(sight, "_worker", object())                             # nobody looks at more
    monkeypatch.setattr(sight, "errors", {"203": 2})
    monkeypatch.setattr(type(sight.images), "row", looked_at_meanwhile)
    listed = get(port, "/api/images?sort=error")
    assert listed["done"] == 1 and [one["id"] for one in listed["images"] if one["looked_at"]] == ["203"]


def test_errors_and_their_order(dense, data):
    port, sight = dense
    deadline, totals = time.monotonic() + 30, {}
    while len(totals) < 7 and time.monotonic() < deadline:
        listed = get(port, "/api/images?sort=error")
        totals = {row["id"]: row["errors"] for row in listed["images"] if row["looked_at"]}
        assert listed["done"] == len(totals) and listed["of"] == 7              # one state, however fast it goes on
        assert [row["looked_at"] for row in listed["images"]] == [True] * len(totals) + [False] * (7 - len(totals))
        time.sleep(0.01)
    assert list(totals.values()) == sorted(totals.values(), reverse=True) and len(set(totals.values())) > 1
    for key, total in totals.items():
        said = get(port, f"/api/images/{key}/errors")
        shown = [one for one in get(port, f"/api/images/{key}/detections")["detections"] if one["score"] >= 0.5]
        assert said["total"] == total and said["places"] == list(range(len(shown))) and len(said["kinds"]) == len(shown)
        assert sum(said["counts"].values()) == len(said["kinds"]) + len(said["missed"])
    everything = get(port, f"/api/images/{FIRST}/errors?threshold=1")           # all objects are missed, not the crowd
    truth = get(port, f"/api/images/{FIRST}/detections")["truth"]
    assert everything["missed"] == [k for k, one in enumerate(truth) if not one["crowd"]] and not everything["kinds"]
    assert get(port, "/api/images/206/neighbour?step=1&sort=name") == {"id": None}
    worst = list(totals)
    assert get(port, f"/api/images/{worst[0]}/neighbour?step=1&sort=error") == {"id": worst[1]}
    assert "between 0 and 1" in refusal(port, f"/api/images/{FIRST}/errors?threshold=7", 400)


def test_objects_are_those_of_evaluation(tmp_path, checkpoints):
    """Boxes without an area, too, which the report counts as missed."""
    data = make_rectangles(tmp_path / "data")

    def add_empty(content):
        content["annotations"].append({"id": 1, "image_id": FIRST, "category_id": 7, "bbox": [10, 10, 0, 0], "area": 0,
                                       "iscrowd": 0})
    write_annotations(data, "val", damaged(read_annotations(data, "val"), add_empty))
    with serving(checkpoints[DENSE], data) as (port, sight):
        missed = get(port, f"/api/images/{FIRST}/errors?threshold=1")["missed"]
    nothing = Found(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), None, None)
    assert len(missed) == judge(sight.images.dataset.coco, {FIRST: nothing}).missed(1).sum() == 2


def test_an_image_of_another_size(tmp_path, checkpoints):
    """Is not shown with boxes that are not its own; nor would evaluation go on."""
    data = make_rectangles(tmp_path / "data")
    path = data / "val2017" / "201.png"
    Image.open(path).resize((36, 32)).save(path)
    with serving(checkpoints[DENSE], data) as (port, _):
        for what in ("picture", "thumbnail", "detections"):
            said = refusal(port, f"/api/images/201/{what}", 422)
            assert "201.png has 36 x 32 pixels, but the annotations say 72 x 64" in said and "correct width" in said
        assert get(port, f"/api/images/{FIRST}/detections")


def test_looking_for_errors_survives_an_image(tmp_path, checkpoints, data, monkeypatch, capsys):
    """Whatever is wrong with it: it is said once, and the others are looked at."""
    with serving(checkpoints[DENSE], data) as (port, sight):
        found, asked = sight.found, []

        def fail(key, urgent=True):
            asked.append(key)
            if key == "202":
                raise RuntimeError("out of memory")
            return found(key, urgent)
        monkeypatch.setattr(sight, "found", fail)
        until(lambda: get(port, "/api/images?sort=error")["done"] == 7)
        last = get(port, "/api/images?sort=error")["images"][-1]
        until(lambda: sight._worker is None)
    assert last["id"] == "202" and last["errors"] is None and asked.count("202") == 1
    assert capsys.readouterr().out.count("image 202: RuntimeError: out of memory") == 1


def until(holds, seconds: float = 30.0) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never did"
        time.sleep(0.05)


def test_recent_values_are_all_that_is_kept():
    load_script()
    from explore_page.images import Recent
    recent = Recent(2)
    for key in range(5):
        assert [recent.get(key, lambda key=key: key) for _ in range(3)] == [key] * 3
    assert len(recent._values) == 2 and not recent._making


def test_many_ask_at_once(served):
    """The model explains one image at a time, whoever asks; what is kept of other images does not mix in."""
    port, sight, _, _ = served
    targets = [f"/api/images/{FIRST + i % 7}/query/{i % 3}" for i in range(21)]
    answers: dict[int, dict] = {}
    threads = [threading.Thread(target=lambda i=i: answers.update({i: get(port, targets[i])})) for i in range(21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 21
    for i in range(0, 21, 4):
        assert answers[i] == get(port, targets[i])
    assert len({answers[i]["layers"][0]["heat"] for i in range(7)}) == 7        # or the test would show nothing


def test_who_waits_in_front_of_the_page_goes_first():
    load_script()
    from explore_page.sight import Turns
    turns, order, threads = Turns(), [], []

    def wait(name: str, urgent: bool) -> None:
        with turns.turn(urgent):
            order.append(name)

    with turns.turn():
        for name in (*["background"] * 6, "user"):
            threads.append(threading.Thread(target=wait, args=(name, name == "user")))
            threads[-1].start()
            time.sleep(0.05)
    for thread in threads:
        thread.join(5)
    assert order == ["user", *["background"] * 6]


# Uploads.

def test_an_upload(dense, checkpoints):
    port, _ = dense
    status, _, content = ask(port, "/api/uploads", "POST", png())
    row = json.loads(content)
    assert status == 201 and (row["width"], row["height"]) == (60, 40)
    said, want = get(port, f"/api/images/{row['id']}/detections"), detr.load(checkpoints[DENSE])(
        Image.open(io.BytesIO(png())))[0]
    assert sorted(one["score"] for one in said["detections"]) == sorted(want["scores"].tolist()) and said["truth"] is None
    assert get(port, f"/api/images/{row['id']}/query/0")["path"]
    assert "nobody has said" in refusal(port, f"/api/images/{row['id']}/errors", 404)
    assert get(port, "/api/images")["uploads"][0] == row
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(png())).save(turned, "JPEG", exif=exif)
    row = json.loads(ask(port, "/api/uploads", "POST", turned.getvalue())[2])
    assert (row["width"], row["height"]) == (40, 60)


def test_large_images_are_shown_smaller(dense):
    port, _ = dense
    key = json.loads(ask(port, "/api/uploads", "POST", png(3000, 300))[2])["id"]
    status, headers, content = ask(port, f"/api/images/{key}/picture")
    assert headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(content)).size == (2048, 205)
    assert get(port, f"/api/images/{key}/detections")["width"] == 3000          # boxes are in pixels of the image


def test_the_last_few_are_kept(dense):
    port, _ = dense
    keys = [json.loads(ask(port, "/api/uploads", "POST", png(20 + i, 20))[2])["id"] for i in range(8)]
    assert [row["id"] for row in get(port, "/api/images")["uploads"]] == keys[:1:-1]
    assert "no longer kept" in refusal(port, f"/api/images/{keys[0]}/picture", 404)


@pytest.mark.parametrize("content, status, message", [
    (b"These are words, whatever the name of the file says.", 415, "this is no image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415, "this is no image"),
    (png(kind="TIFF"), 415, "none of BMP, GIF, JPEG, PNG, WEBP"),
    (b"", 400, "empty"),
    (png()[:300], 422, "damaged or cut short"),
    (png_header(30_000, 30_000), 413, "50 megapixels"),
    (png_header(9_000, 6_000), 413, "9000 x 6000 pixels"),                      # not so many that Pillow minds
])
def test_what_is_no_image(dense, content, status, message, monkeypatch):
    port, _ = dense
    decoded, before = [], get(port, "/api/images")["uploads"]
    if status != 422:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    assert message in refusal(port, "/api/uploads", status, "POST", content, Content_Type="image/png")
    assert not decoded and get(port, "/api/images")["uploads"] == before


def test_too_many_bytes(dense):
    """Refused by what the header says, and where it says nothing, while they come in."""
    port, _ = dense
    assert "larger than 20 MB" in refusal(port, "/api/uploads", 413, "POST", b"", content_length="20000001")
    connection, sent = socket.create_connection(("127.0.0.1", port), timeout=30), 0
    with connection:
        connection.sendall(b"POST /api/uploads HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b"10000\r\n" + bytes(65536) + b"\r\n"
        with contextlib.suppress(OSError):                                      # it hangs up
            while sent < 60_000_000:
                connection.sendall(part)
                sent += 65536
        assert 20_000_000 < sent < 60_000_000
    assert get(port, "/api/about")


def test_uploads_that_do_not_come(dense, monkeypatch):
    """Those that stall end, so that others may come."""
    from explore_page import server
    port, _ = dense
    monkeypatch.setattr(server, "PATIENCE", 1.0)
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(server.AT_ONCE)]
    for connection in stalled:
        connection.sendall(b"POST /api/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nab")
    until(lambda: ask(port, "/api/uploads", "POST", png())[0] == 429)
    for connection in stalled:
        with connection:
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))         # it hangs up
        assert b" 408 " in answer.splitlines()[0] and b"did not come within 1 seconds" in answer
    assert ask(port, "/api/uploads", "POST", png())[0] == 201


def test_uploads_are_decoded_two_at_a_time(monkeypatch):
    load_script()
    from explore_page.images import Images
    images, at_once, most, lock = Images(None, [], 3), [0], [0], threading.Lock()
    decode = images._decode

    def slowly(content):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.1)
        with lock:
            at_once[0] -= 1
        return decode(content)
    monkeypatch.setattr(images, "_decode", slowly)
    threads = [threading.Thread(target=images.upload, args=(png(20 + i),)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(images.uploads) == 5 and most == [2]


# What nobody gets.

LEAVING = ["/../../etc/passwd", "/image/../../etc/passwd", "/api/images/../../../../etc/passwd/picture",
           "/api/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd/picture", "/api/images/..%2f..%2fetc%2fpasswd/picture",
           "/api/images/%2fetc%2fpasswd/picture", "//etc/passwd", "/etc/passwd", "/%2e%2e/explore.py", "/server.py",
           "/page.js/../server.py", "/../server.py", "/api/images/200.png/picture", "/page.html%00.py",
           "/api/images/../val2017/200.png/picture", "/api/images/-1/picture", "/api/images/200%00/picture",
           "/api/images/u0123456789abcdef/picture", "/..\\..\\etc\\passwd"]


@pytest.mark.parametrize("target", LEAVING)
def test_paths_that_leave_the_folder(dense, target):
    refusal(dense[0], target, 404)


def test_links_that_leave_the_folder(tmp_path, checkpoints):
    data = make_rectangles(tmp_path / "data")
    secret = tmp_path / "elsewhere" / "secret.png"
    secret.parent.mkdir()
    Image.new("RGB", (72, 64), (1, 2, 3)).save(secret)
    (data / "val2017" / "201.png").unlink()
    (data / "val2017" / "201.png").symlink_to(secret)

    def leave(content):
        content["images"][2]["file_name"] = "../../elsewhere/secret.png"
    write_annotations(data, "val", damaged(read_annotations(data, "val"), leave))
    (data / "val2017" / "203.png").write_bytes(b"no image")
    with serving(checkpoints[DENSE], data) as (port, sight):
        for key in (201, 202):
            for what in ("picture", "thumbnail", "detections", "query/0", "point?x=1&y=1"):
                assert "outside of the folder" in refusal(port, f"/api/images/{key}/{what}", 403)
        assert "203.png" in refusal(port, "/api/images/203/picture", 422)
        while get(port, "/api/images?sort=error")["done"] < 7:
            time.sleep(0.05)
        last = get(port, "/api/images?sort=error")["images"][-3:]
        assert {row["id"] for row in last} == {"201", "202", "203"} and {row["errors"] for row in last} == {None}
    with serving(checkpoints[DENSE], data, "--images_in", str(secret.parent)) as (port, _):
        for key in (201, 202):
            assert Image.open(io.BytesIO(ask(port, f"/api/images/{key}/picture")[2])).getpixel((0, 0)) == (1, 2, 3)


def test_a_folder_of_images_that_is_elsewhere(tmp_path, checkpoints):
    data = make_rectangles(tmp_path / "data")
    (data / "val2017").rename(tmp_path / "moved")
    (data / "val2017").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"add --images_in {tmp_path / 'moved'}"), serving(checkpoints[DENSE], data):
        pass
    with serving(checkpoints[DENSE], data, "--images_in", str(tmp_path / "moved")) as (port, _):
        assert ask(port, "/api/images/201/picture")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "a@127.0.0.1",
                                  "127.0.0.1@evil.example", "192.168.0.7", "[::1", "localhost.evil.example:80"])
def test_names_that_are_not_the_servers(dense, host):
    assert "does not go by the name" in refusal(dense[0], "/api/about", 421, host=host)


def test_names_that_are(dense):
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert ask(dense[0], "/api/about", host=host)[0] == 200


def test_a_server_for_others():
    load_script()
    from explore_page.server import Guard, is_loopback
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "box")] == \
        [True] * 3 + [False] * 4
    guard = Guard(None, "box")
    for host in ("box:80", "10.0.0.1", "[fe80::1]:80", "localhost", socket.gethostname()):
        assert guard.knows(host)
    assert not guard.knows("evil.example")
    guard = Guard(None, "MyBox.lan")
    assert guard.knows("MyBox.lan:8000") and guard.knows("mybox.lan:8000") and not guard.knows("mybox")


@pytest.mark.parametrize("headers", [
    {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}])
def test_other_pages_may_not_ask(dense, headers):
    port, _ = dense
    before = get(port, "/api/images")["uploads"]
    assert "another page" in refusal(port, "/api/uploads", 403, "POST", png(), **headers)
    assert get(port, "/api/images")["uploads"] == before


def test_headers_of_every_answer(dense, monkeypatch):
    port, sight = dense

    def fail(key):
        raise KeyError("a\nfault")
    monkeypatch.setattr(sight, "detections", fail)
    assert "KeyError; its terminal says where" in refusal(port, f"/api/images/{FIRST}/detections", 500)
    for target, status in (("/", 200), ("/page.js", 200), ("/page.css", 200), ("/draw.js", 200), ("/icon.svg", 200),
                           ("/api/about", 200), ("/nowhere", 404), (f"/api/images/{FIRST}/detections", 500),
                           (f"/api/images/{FIRST}/thumbnail", 200), ("/api/uploads", 405)):
        got, headers, content = ask(port, target)
        assert got == status and headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["cross-origin-resource-policy"] == "same-origin" and "server" not in headers
    assert ask(port, "/api/about", host="evil.example")[1]["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere():
    files = [path for path in (SCRIPTS / "explore_page").iterdir() if path.suffix in (".html", ".js", ".css")]
    assert len(files) == 4
    for path in files:
        text = path.read_text(encoding="utf-8")
        for word in ("http:", "https:", "//cdn", "@import", " style=\"", "innerHTML", "onclick=\"", "eval("):
            assert word not in text, (path.name, word)


# The command line.

@pytest.mark.parametrize("given", [".", "annotations", "annotations/instances_val2017.json"])
def test_data_by_any_name(checkpoints, data, given):
    with serving(checkpoints[DENSE], None, "--data", str(data / given)) as (port, _):
        assert get(port, "/api/about")["images"] == 7 and ask(port, "/api/images/201/picture")[0] == 200


def run(*argv: str) -> None:
    script = load_script()
    script.main(script.get_args_parser().parse_args(list(argv)))


@pytest.mark.parametrize("argv, message", [
    (["--threshold", "2"], "--threshold 2.0: scores are between 0 and 1"),
    (["--coco_path", "a", "--data", "b"], "give one of them"),
    (["--coco_path", "nowhere"], "there is no such folder"),
    (["--images_in", "a"], "give --data or --coco_path too"),
    (["--split", "test"], "--split test is about the images of a data set; give --data or --coco_path too"),
    (["--port", "99999"], "0 to 65535"),
    (["--host", "203.0.113.7"], "an address of this machine"),
])
def test_what_the_command_line_refuses(checkpoints, argv, message, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)     # what is not refused ends, too
    with pytest.raises((ValueError, OSError), match=message):
        run("--resume", str(checkpoints[DENSE]), *argv)


def test_packages_that_are_missing(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else there(name, *a))
    with pytest.raises(ImportError, match=r"the page needs uvicorn: pip install -e '.\[explore\]'"):
        run("--resume", "x")


def test_ports(checkpoints, data, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="in use.*; --port 0 takes a free port"):
            run("--resume", str(checkpoints[DENSE]), "--port", str(taken.getsockname()[1]))
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(sockets[0].getsockname()))
    run("--resume", str(checkpoints[DENSE]), "--coco_path", str(data), "--port", "0")
    said = capsys.readouterr().out
    assert served[0][0] == "127.0.0.1" and f"http://127.0.0.1:{served[0][1]}" in said and "whoever" not in said
    run("--resume", str(checkpoints[DENSE]), "--host", "0.0.0.0", "--port", "0")
    assert "whoever reaches this machine's port" in capsys.readouterr().out
