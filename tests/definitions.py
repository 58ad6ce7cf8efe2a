"""Definitions from the papers, in plain Python numbers, for tests to compare with."""


def giou(a: list[float], b: list[float]) -> float:
    """Generalized IoU of two cxcywh boxes (Rezatofighi et al., 2019, algorithm 1)."""
    (al, at, ar, ab), (bl, bt, br, bb) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    inter = max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))
    union = (ar - al) * (ab - at) + (br - bl) * (bb - bt) - inter
    hull = (max(ar, br) - min(al, bl)) * (max(ab, bb) - min(at, bt))
    return inter / union - (hull - union) / hull
