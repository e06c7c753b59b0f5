#!/usr/bin/env python3
"""Draw a sample data set: 60 cats and 60 dogs, in the folders cat and dog.

    python .tools/draw_sample_images.py

Poses, coats, backgrounds and sizes vary, and the same images come out each time.
"""

import argparse
import math
import pathlib
import random
import sys

from PIL import Image, ImageDraw

COUNT = 60  # images per class
SIDE = 400  # of the square that an animal is drawn in
OVERSAMPLING = 2  # drawn larger and then scaled down, which makes smooth edges
INK = (40, 30, 30)
COATS = [  # fur, its markings, and the paler belly and muzzle
    ((226, 143, 67), (183, 98, 38), (250, 226, 194)),
    ((139, 138, 140), (89, 88, 94), (226, 226, 226)),
    ((72, 66, 68), (48, 42, 45), (172, 164, 162)),
    ((240, 222, 188), (201, 163, 112), (255, 248, 234)),
    ((148, 98, 62), (98, 60, 38), (233, 206, 174)),
    ((244, 240, 234), (120, 98, 84), (255, 255, 255)),
    ((205, 164, 104), (140, 100, 58), (247, 231, 204)),
]
EYES = [(112, 176, 74), (226, 186, 58), (92, 164, 204)]


class Pen:
    """Draws on a square of SIDE units, transparent where nothing is drawn."""

    def __init__(self) -> None:
        self.image = Image.new('RGBA', (SIDE * OVERSAMPLING,) * 2)
        self.draw = ImageDraw.Draw(self.image)

    def ellipse(
        self, x: float, y: float, width: float, height: float, fill: tuple, angle: float = 0
    ) -> None:
        """Draws an ellipse of two radii around a point, turned by degrees."""
        turn = math.radians(angle)
        self.polygon(
            [
                (
                    x
                    + width * math.cos(t) * math.cos(turn)
                    - height * math.sin(t) * math.sin(turn),
                    y
                    + width * math.cos(t) * math.sin(turn)
                    + height * math.sin(t) * math.cos(turn),
                )
                for t in (math.tau * i / 60 for i in range(60))
            ],
            fill,
        )

    def polygon(self, points: list, fill: tuple) -> None:
        """Draws a filled shape with an outline."""
        points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self.draw.polygon(points, fill)
        self.draw.line([*points, points[0], points[1]], INK, 2 * OVERSAMPLING, 'curve')

    def line(self, points: list, width: float, fill: tuple = INK) -> None:
        """Draws a line with round ends."""
        points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        width *= OVERSAMPLING
        self.draw.line(points, fill, round(width), 'curve')
        for x, y in (points[0], points[-1]):
            self.draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill)

    def limb(self, points: list, width: float, fill: tuple) -> None:
        """Draws a leg or a tail: a thick line with an outline."""
        self.line(points, width + 4)
        self.line(points, width, fill)


def curve(start: tuple, middle: tuple, end: tuple) -> list:
    """Returns points of the quadratic Bezier curve from start to end."""
    return [
        tuple(
            (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t * t * c
            for a, b, c in zip(start, middle, end, strict=True)
        )
        for t in (i / 20 for i in range(21))
    ]


def draw_cat_head(pen: Pen, x: float, y: float, r: float, coat: tuple, rng: random.Random) -> None:
    """Draws pointed ears, slit pupils, a small pink nose and whiskers around a point; r is half the head's width."""
    fur, marking, pale = coat
    for side in (-1, 1):
        tip = (x + side * 0.86 * r, y - rng.uniform(1.2, 1.4) * r)
        pen.polygon(
            [(x + side * 0.97 * r, y - 0.2 * r), tip, (x + side * 0.2 * r, y - 0.75 * r)], fur
        )
        inner = [(x + side * 0.85 * r, y - 0.5 * r), (tip[0] - side * 0.04 * r, tip[1] + 0.25 * r)]
        pen.polygon([*inner, (x + side * 0.42 * r, y - 0.76 * r)], (240, 170, 170))
    pen.ellipse(x, y, r, 0.86 * r, fur)
    if rng.random() < 0.6:  # a tabby
        for shift in (-0.22, 0, 0.22):
            pen.line(
                [(x + shift * r, y - 0.78 * r), (x + shift * r, y - 0.5 * r)], 0.08 * r, marking
            )
        for side in (-1, 1):
            for shift in (0.1, 0.28):
                pen.line(
                    [(x + side * 0.95 * r, y + shift * r), (x + side * 0.72 * r, y + shift * r)],
                    0.06 * r,
                    marking,
                )
    iris = rng.choice(EYES)
    for side in (-1, 1):
        pen.ellipse(x + side * 0.42 * r, y - 0.12 * r, 0.23 * r, 0.2 * r, iris, side * 12)
        pen.ellipse(x + side * 0.42 * r, y - 0.12 * r, 0.05 * r, 0.18 * r, INK)
        pen.ellipse(x + side * 0.17 * r, y + 0.4 * r, 0.2 * r, 0.15 * r, pale)
        for slope in (-0.14, 0.02, 0.18):
            whisker = [
                (x + side * 0.3 * r, y + 0.38 * r),
                (x + side * 1.3 * r, y + (0.38 + slope * 1.4) * r),
            ]
            pen.line(whisker, max(1.2, 0.02 * r))
    pen.polygon(
        [(x - 0.1 * r, y + 0.2 * r), (x + 0.1 * r, y + 0.2 * r), (x, y + 0.31 * r)], (232, 128, 140)
    )


def draw_dog_head(pen: Pen, x: float, y: float, r: float, coat: tuple, rng: random.Random) -> None:
    """Draws hanging ears, a muzzle with a big nose, and perhaps a tongue around a point; r is half the head's width."""
    fur, marking, pale = coat
    pen.ellipse(x, y, 0.82 * r, 0.92 * r, fur)
    patch = rng.choice((-1, 0, 0, 1))
    if patch:
        pen.ellipse(x + patch * 0.36 * r, y - 0.2 * r, 0.32 * r, 0.38 * r, marking)
    for side in (-1, 1):
        length = rng.uniform(0.62, 0.78) * r
        pen.ellipse(
            x + side * 0.86 * r,
            y + 0.05 * r,
            0.28 * r,
            length,
            marking,
            side * rng.uniform(-22, -8),
        )
    if rng.random() < 0.7:
        pen.ellipse(x, y + 0.92 * r, 0.17 * r, 0.3 * r, (232, 96, 112))
        pen.line([(x, y + 0.8 * r), (x, y + 1.05 * r)], 0.03 * r)
    pen.ellipse(x, y + 0.48 * r, 0.5 * r, 0.42 * r, pale)
    pen.ellipse(x, y + 0.27 * r, 0.22 * r, 0.15 * r, (30, 24, 26))
    pen.ellipse(x - 0.07 * r, y + 0.22 * r, 0.05 * r, 0.03 * r, (150, 150, 150))
    for side in (-1, 1):
        pen.line(
            curve(
                (x, y + 0.58 * r),
                (x + side * 0.2 * r, y + 0.78 * r),
                (x + side * 0.36 * r, y + 0.56 * r),
            ),
            0.04 * r,
        )
        pen.ellipse(x + side * 0.33 * r, y - 0.18 * r, 0.12 * r, 0.14 * r, (70, 42, 26))
        pen.ellipse(
            x + side * 0.33 * r - 0.04 * r, y - 0.23 * r, 0.04 * r, 0.04 * r, (255, 255, 255)
        )
        pen.line(
            [(x + side * 0.2 * r, y - 0.44 * r), (x + side * 0.45 * r, y - 0.42 * r)],
            0.06 * r,
            marking,
        )


def draw_animal(kind: str, rng: random.Random) -> Image.Image:
    """Returns a cat or a dog, its head alone, sitting, or standing: RGBA, SIDE pixels wide and high."""
    pen, coat = Pen(), rng.choice(COATS)
    fur, marking, pale = coat
    cat = kind == 'cat'
    draw_head = draw_cat_head if cat else draw_dog_head
    collar = rng.choice([(204, 50, 50), (50, 92, 190), (40, 150, 90)])
    pose = rng.choice(('head', 'sitting', 'standing'))
    if pose == 'head':
        draw_head(pen, 200, 215, 125, coat, rng)
    elif pose == 'sitting':
        if cat:
            pen.limb(curve((255, 350), (385, 370), (345, rng.uniform(200, 260))), 22, fur)
        else:
            pen.limb(curve((260, 330), (320, 330), (335, 275)), 26, marking)
        pen.ellipse(200, 290, 82 if cat else 92, 95, fur)
        pen.ellipse(200, 280, 42, 62, pale)
        for side in (-1, 1):
            pen.ellipse(200 + side * 68, 358, 42, 26, fur)
            pen.limb([(200 + side * 26, 290), (200 + side * 26, 366)], 30, fur)
        if not cat:
            pen.limb([(160, 215), (200, 228), (240, 215)], 12, collar)
            pen.ellipse(200, 240, 10, 10, (240, 200, 60))
        draw_head(pen, 200, 140, 78, coat, rng)
    else:
        if cat:
            pen.limb(curve((305, 240), (395, 250), (rng.uniform(340, 380), 90)), 18, fur)
        else:
            pen.limb(curve((305, 230), (345, 215), (352, 165)), 24, marking)
        for x in (150, 270):
            pen.limb([(x, 270), (x, 370)], 24, marking)
        pen.ellipse(215, 255, 115, 58 if cat else 66, fur)
        for i in range(3):
            if cat:
                pen.line(
                    curve((200 + 34 * i, 204), (208 + 34 * i, 225), (200 + 34 * i, 246)), 9, marking
                )
            elif fur != marking:
                pen.ellipse(200 + 42 * i, 240 + 14 * (i % 2), 20 - 3 * i, 15, marking)
        for x in (175, 295):
            pen.limb([(x, 280), (x, 370)], 26, fur)
        if not cat:
            pen.limb([(110, 205), (135, 226), (165, 222)], 12, collar)
        draw_head(pen, 115, 160, 68, coat, rng)
    return pen.image


def draw_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """Returns a meadow, a room, or a wall whose color runs from one into another."""

    def gradient(top: tuple, bottom: tuple, height: int) -> Image.Image:
        return Image.composite(
            Image.new('RGB', (width, height), bottom),
            Image.new('RGB', (width, height), top),
            Image.linear_gradient('L').resize((width, height)),
        )

    def pick(low: int, high: int) -> tuple:
        return tuple(rng.randint(low, high) for _ in range(3))

    horizon = int(height * rng.uniform(0.45, 0.75))
    place = rng.choice(('meadow', 'room', 'wall'))
    if place == 'wall':
        return gradient(pick(110, 250), pick(110, 250), height)
    if place == 'room':
        picture = gradient(pick(170, 245), pick(170, 245), height)
        picture.paste(gradient((176, 128, 84), (120, 82, 50), height - horizon), (0, horizon))
        return picture
    picture = gradient((118, 178, 236), (214, 234, 250), height)
    picture.paste(gradient((120, 186, 84), (66, 132, 52), height - horizon), (0, horizon))
    draw = ImageDraw.Draw(picture)
    for _ in range(3):
        x, y, size = rng.randint(0, width), rng.randint(0, horizon // 2), rng.randint(14, 34)
        for shift in (-1, 0, 1):
            draw.ellipse(
                (x + shift * size - size, y - size // 2, x + shift * size + size, y + size // 2),
                'white',
            )
    for _ in range(60):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        draw.line((x, y, x + rng.randint(-3, 3), y - 8), (58, 120, 46), 2)
    return picture


def draw_image(kind: str, seed: int) -> Image.Image:
    """Returns an image of a cat or a dog, 240 to 480 pixels wide and high; the same for the same seed."""
    rng = random.Random(f'{kind} {seed}')
    width, height = rng.randint(240, 480), rng.randint(240, 480)
    picture = draw_background(width, height, rng)
    size = int(min(width, height) * rng.uniform(0.85, 1.05))
    animal = draw_animal(kind, rng).rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        animal = animal.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    animal = animal.resize((size, size), Image.Resampling.LANCZOS)
    x, y = (int(room * rng.uniform(0.3, 0.7)) for room in (width - size, height - size))
    picture.paste(animal, (x, y), animal)
    return picture


def main(output_dir: pathlib.Path) -> None:
    """Draws both folders; does nothing if one of them has something in it."""
    folders = {kind: output_dir / kind for kind in ('cat', 'dog')}
    for folder in folders.values():
        if folder.exists() and any(folder.iterdir()):
            sys.exit(
                f'ERROR: {folder} has files in it already. Move them away, or name another --output_dir.'
            )
    for kind, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(COUNT):
            draw_image(kind, seed).save(folder / f'{kind}.{seed}.jpg', quality=90)
    print(
        f'Drew {COUNT} cats and {COUNT} dogs in {output_dir}. Train on them with --image_dir={output_dir}/'
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = pathlib.Path(__file__).resolve().parent.parent / 'data'
    parser.add_argument(
        '--output_dir', metavar='DIR', type=pathlib.Path, default=data, help='default: %(default)s'
    )
    main(parser.parse_args().output_dir)
