"""The released code's rules in plain loops, and the small file of numbers that they give.

    python tests/reference/make_reference.py

writes author_rule.npz beside this file. Nothing of covidmask is used: each rule stands here step by
step, in float32 as the released code computes, so that a fault of the package cannot hide in both.
`tests/models/test_golden.py` holds these loops against the released code's own numbers where those
are at hand; `tests/models/test_reference.py` holds the package against the file, always. The images
are not square, so that rows and columns cannot be confused, and the inputs keep clear of ties, so
that the order is the same on every machine.
"""

import math
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("author_rule.npz")
SIZES = (2, 4, 8, 16, 32)
RATIOS = (0.1, 0.25, 0.5, 1, 1.5, 2)
f = np.float32


def softmax(row):
    exponents = np.exp(row - row.max())
    return exponents / exponents.sum(dtype=f)


def decode(box, delta):
    """One box and its raw deltas -> the shifted box; coder weights 10, 10, 5, 5."""
    width, height = box[2] - box[0], box[3] - box[1]
    x = box[0] + f(0.5) * width + delta[0] / f(10) * width
    y = box[1] + f(0.5) * height + delta[1] / f(10) * height
    largest = f(math.log(1000 / 16))
    width = np.exp(min(delta[2] / f(5), largest)) * width
    height = np.exp(min(delta[3] / f(5), largest)) * height
    half_width, half_height = f(0.5) * width, f(0.5) * height
    return np.array([x - half_width, y - half_height, x + half_width, y + half_height], dtype=f)


def clip(box, height, width):
    right, bottom = f(width), f(height)
    x1, x2 = (min(max(side, f(0)), right) for side in (box[0], box[2]))
    y1, y2 = (min(max(side, f(0)), bottom) for side in (box[1], box[3]))
    return np.array([x1, y1, x2, y2], dtype=f)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, f(0)) * max(height, f(0))
    return shared / (area(one) + area(other) - shared)


def ranked(logits, deltas, proposals, shape, n, nms, score=-0.01):
    """Logits [P,C], raw deltas [P,4C], proposals [P,4] of one image of `shape` (height, width).

    Returns:
        roi [K], label [K], box [K,4] and row [K,5], best first, K <= n; and the distance of the
        nearest decision from falling otherwise.
    """
    found = []
    for roi in range(len(proposals)):
        scores = softmax(logits[roi])
        for label in range(1, len(scores)):  # 0 is background
            delta = deltas[roi, 4 * label : 4 * label + 4]
            box = clip(decode(proposals[roi], delta), *shape)
            if area(box) > 0 and scores[label] > score:
                found.append((scores[label], roi, label, box, delta))
    found.sort(key=lambda one: -one[0])  # stable: of equal scores the first comes first
    kept, margin = [], 1.0
    for one in found:
        overlaps = [iou(one[3], other[3]) for other in kept if other[2] == one[2]]
        margin = min([margin, *(abs(overlap - nms) for overlap in overlaps)])
        if not any(overlap > nms for overlap in overlaps):
            kept.append(one)
    kept = kept[:n]
    scores = [one[0] for one in kept]
    margin = min([margin, *(-np.diff(scores))]) if len(kept) > 1 else margin
    return {
        "roi": np.array([one[1] for one in kept], dtype=np.int64),
        "label": np.array([one[2] for one in kept], dtype=np.int64),
        "box": np.array([one[3] for one in kept], dtype=f).reshape(-1, 4),
        "row": np.array([[one[0], *one[4]] for one in kept], dtype=f).reshape(-1, 5),
        "margin": np.array(margin, dtype=f),
    }


def padding(k, n, order):
    """Which of k boxes fills each of n rows; `order`: a permutation of range(n - 2)."""
    starts = [0, *sorted(place + 1 for place in order[: k - 1]), n]
    return [box for box in range(k) for _ in range(starts[box], starts[box + 1])]


def average_precision(masks, labels, scores, true_masks, true_labels, threshold):
    """One image: bool masks [K,H,W] and [T,H,W], at least one of each."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])  # rising
    hits = set()
    for true, label in zip(true_masks, true_labels, strict=True):
        best, largest = None, f(threshold)
        for i in order:
            shared = f((masks[i] & true).sum()) / f((masks[i] | true).sum())
            if labels[i] == label and shared > largest:
                best, largest = i, shared
        hits.add(best)
    precision, recall, right = [], [], 0
    for count, i in enumerate(reversed(order), start=1):
        right += i in hits
        precision.append(right / count)
        recall.append(right / len(true_labels))
    before, total = 0.0, 0.0
    for place, now in enumerate(recall):
        total += (now - before) * max(precision[place:])
        before = now
    return total


def cell_anchors(sizes, ratios=RATIOS):
    cells = []
    for ratio in ratios:
        tall = np.sqrt(f(ratio))
        wide = f(1) / tall
        for size in sizes:
            x, y = wide * f(size) / f(2), tall * f(size) / f(2)
            cells.append([np.rint(-x), np.rint(-y), np.rint(x), np.rint(y)])  # half to even
    return np.array(cells, dtype=f)


def anchors(rows, columns, stride, sizes=SIZES):
    """All anchors of a map, row by row: [rows * columns * 30, 4]."""
    corners = [
        cell + f(stride) * np.array([column, row, column, row], dtype=f)
        for row in range(rows)
        for column in range(columns)
        for cell in cell_anchors(sizes)
    ]
    return np.stack(corners)


def roi_align(map, box, stride, bins=7, points=2):
    """One map [h,w] and one box -> [bins, bins]."""
    height, width = map.shape
    x1, y1, x2, y2 = (side / stride for side in box.tolist())
    bin_width, bin_height = max(x2 - x1, 1) / bins, max(y2 - y1, 1) / bins

    def read(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return 0.0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        down, along = y - top, x - left
        upper = (1 - along) * map[top, left] + along * map[top, right]
        lower = (1 - along) * map[bottom, left] + along * map[bottom, right]
        return (1 - down) * upper + down * lower

    result = np.zeros((bins, bins))
    for i in range(bins):
        for j in range(bins):
            for a in range(points):
                for b in range(points):
                    y = y1 + (i + (a + 0.5) / points) * bin_height
                    x = x1 + (j + (b + 0.5) / points) * bin_width
                    result[i, j] += read(y, x) / points**2
    return result


# --- the inputs -----------------------------------------------------------------------------------


def boxes_inside(rng, count, height, width, largest):
    """Boxes whose corners lie on quarters of a pixel: [count, 4]."""
    start = rng.uniform(0, 1, (count, 2)) * [width - 2, height - 2]
    side = 1 + rng.uniform(0, 1, (count, 2)) ** 2 * largest
    end = np.minimum(start + side, [width, height])
    return (np.rint(4 * np.concatenate([start, end], axis=1)) / 4).astype(f)


def ranking_case(rng):
    height, width, classes = 60, 100, 3
    proposals = boxes_inside(rng, 36, height, width, 30)
    special = [
        [98, 20, 99, 40],  # pushed out of the image on the right by its deltas
        [30, 58, 50, 59.5],  # and this one at the bottom
        [40, 30, 41, 31],  # grows beyond log(1000 / 16), where exp is capped
        [10, 10, 30, 10],  # no height
    ]
    proposals = np.concatenate([proposals, np.array(special, dtype=f)])
    deltas = rng.normal(0, 1.5, (40, 4 * classes)).astype(f)
    deltas[36, 4:8] = [60, 0, -5, 0]
    deltas[37, 4:8] = [0, 60, 0, -5]
    deltas[38, 4:] = [50, 30, 24, 22, -300, 30, 24, 1]
    proposals[5:12] = proposals[4] + rng.integers(-2, 3, (7, 4)).astype(f) / 4  # for the NMS
    proposals[5:12] = proposals[5:12].clip(0, [width, height, width, height])
    deltas[4:12, 4:] = rng.normal(0, 0.3, (8, 8))
    logits = rng.normal(0, 1.5, (40, classes)).astype(f)
    return {
        "logits": logits,
        "deltas": deltas,
        "proposals": proposals,
        "shape": np.array([height, width]),
    }


def masks_of(boxes, height, width):
    masks = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def arrays():
    """Everything that the file holds."""
    import torch  # draws the permutations, as in the released code

    rng = np.random.default_rng(2020)
    result = {}
    case = ranking_case(rng)
    kept = ranked(*case.values(), n=1000, nms=0.75)
    assert kept["margin"] > 1e-5, kept["margin"]
    result |= {f"ranked/{key}": value for key, value in {**case, **kept}.items()}
    for n, k, seed in ((8, 1, 0), (8, 3, 1), (8, 7, 2), (100, len(kept["roi"]), 3)):
        order = torch.randperm(n - 2, generator=torch.Generator().manual_seed(seed)).tolist()
        result[f"padding/{n}_{k}_{seed}"] = np.array(padding(k, n, order))

    height, width = 30, 50
    true = np.array([[2, 3, 22, 13], [30, 5, 46, 28], [4, 18, 12, 26]], dtype=f)
    found = np.array(
        [[3, 3, 23, 13], [2, 4, 22, 13], [31, 4, 47, 27], [30, 5, 46, 28], [40, 0, 50, 4],
         [4, 18, 12, 24]], dtype=f,
    )  # fmt: skip
    true_labels, labels = np.array([1, 2, 1]), np.array([1, 1, 2, 1, 2, 1])
    scores = np.array([0.8, 0.9, 0.6, 0.7, 0.95, 0.3], dtype=f)
    thresholds = np.arange(10, 20) / 20
    masks, true_masks = masks_of(found, height, width), masks_of(true, height, width)
    ap = [
        average_precision(masks, labels, scores, true_masks, true_labels, threshold)
        for threshold in thresholds
    ]
    case = {"shape": [height, width], "true_boxes": true, "true_labels": true_labels,
            "boxes": found, "labels": labels, "scores": scores, "thresholds": thresholds,
            "ap": ap}  # fmt: skip
    result |= {f"ap/{key}": np.array(value) for key, value in case.items()}

    result["anchors/map"] = np.array([2, 3, 32])  # rows, columns, stride
    result["anchors/all"] = anchors(2, 3, 32)

    map = rng.integers(-50, 50, (8, 16)).astype(f) / 10  # of an image of 60 x 100, padded
    boxes = boxes_inside(rng, 6, 60, 100, 50)
    boxes[0] = [80, 50, 100, 60]  # the far corner
    result |= {"align/map": map, "align/boxes": boxes}
    result["align/pooled"] = np.stack([roi_align(map, box, 8) for box in boxes]).astype(f)
    return result


if __name__ == "__main__":
    np.savez_compressed(FILE, **arrays())
    print(f"{FILE}: {FILE.stat().st_size} bytes")
