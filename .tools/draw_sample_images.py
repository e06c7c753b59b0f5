#!/usr/bin/env python3
"""Draw a sample data set: 60 cats and 60 dogs, in the folders cat and dog.

    python .tools/draw_sample_images.py

Poses, coats, backgrounds and sizes vary, and the same images come out each time.
"""

import argparse
import io
import math
import os
import pathlib
import random
import sys
import tempfile
from typing import NamedTuple

try:
    from PIL import Image, ImageDraw
except ImportError as error:
    sys.exit(
        f'ERROR: {error}. Run this in the environment, as README.md shows: pipenv run quickstart'
    )

COUNT = 60  # images per class
SIDE = 400  # of the square that an animal is drawn in
OVERSAMPLING = 2  # drawn larger and then scaled down, which makes smooth edges
BOTH_SIDES = (-1, 1)

Point = tuple[float, float]
Color = tuple[int, int, int]

INK = (40, 30, 30)
WHITE = (255, 255, 255)
EAR_PINK = (240, 170, 170)
NOSE_PINK = (232, 128, 140)
TONGUE = (232, 96, 112)
DOG_NOSE = (30, 24, 26)
DOG_EYE = (70, 42, 26)
GLEAM = (150, 150, 150)
GOLD = (240, 200, 60)
FLOOR = (176, 128, 84), (120, 82, 50)  # at the horizon, and in front
SKY = (118, 178, 236), (214, 234, 250)
GRASS = (120, 186, 84), (66, 132, 52)
BLADE = (58, 120, 46)
CAT_EYES = [(112, 176, 74), (226, 186, 58), (92, 164, 204)]
COLLARS = [(204, 50, 50), (50, 92, 190), (40, 150, 90)]


class Coat(NamedTuple):
    fur: Color
    marking: Color
    pale: Color  # belly and muzzle


COATS = [
    Coat((226, 143, 67), (183, 98, 38), (250, 226, 194)),
    Coat((139, 138, 140), (89, 88, 94), (226, 226, 226)),
    Coat((72, 66, 68), (48, 42, 45), (172, 164, 162)),
    Coat((240, 222, 188), (201, 163, 112), (255, 248, 234)),
    Coat((148, 98, 62), (98, 60, 38), (233, 206, 174)),
    Coat((244, 240, 234), (120, 98, 84), (255, 255, 255)),
    Coat((205, 164, 104), (140, 100, 58), (247, 231, 204)),
]


class Pen:
    """Draws on a square, in units of a scale around an origin."""

    def __init__(self, draw: ImageDraw.ImageDraw, origin: Point = (0, 0), scale: float = 1) -> None:
        self.draw = draw
        self.origin = origin
        self.scale = scale

    def at(self, x: float, y: float, scale: float = 1) -> 'Pen':
        """Returns a pen whose origin and scale are given in the units of this one."""
        left, top = self.origin
        origin = (left + x * self.scale, top + y * self.scale)
        return Pen(self.draw, origin, self.scale * scale)

    def place(self, points: list[Point]) -> list[Point]:
        """Returns where points are in the image."""
        origins = [self.at(x, y).origin for x, y in points]
        return [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in origins]

    def ellipse(self, center: Point, radii: Point, fill: Color, angle: float = 0) -> None:
        """Draws an ellipse, turned by degrees."""
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        width, height = radii
        points = []
        for index in range(60):
            turn = math.tau * index / 60
            along, across = width * math.cos(turn), height * math.sin(turn)
            points.append((along * cos - across * sin, along * sin + across * cos))
        self.at(*center).polygon(points, fill)

    def polygon(self, points: list[Point], fill: Color) -> None:
        """Draws a filled shape with an outline."""
        points = self.place(points)
        self.draw.polygon(points, fill)
        self.draw.line([*points, points[0], points[1]], INK, 2 * OVERSAMPLING, 'curve')

    def line(self, points: list[Point], width: float, fill: Color = INK) -> None:
        """Draws a line with round ends."""
        points = self.place(points)
        width *= self.scale * OVERSAMPLING
        self.draw.line(points, fill, round(width), 'curve')
        radius = width / 2
        for x, y in (points[0], points[-1]):
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def limb(self, points: list[Point], width: float, fill: Color) -> None:
        """Draws a leg or a tail: a thick line with an outline."""
        self.line(points, width + 4)
        self.line(points, width, fill)


def curve(start: Point, middle: Point, end: Point) -> list[Point]:
    """Returns points of the quadratic Bezier curve from start to end."""
    points = []
    for index in range(21):
        t = index / 20
        weights = (1 - t) ** 2, 2 * t * (1 - t), t * t
        x, y = (
            weights[0] * a + weights[1] * b + weights[2] * c
            for a, b, c in zip(start, middle, end, strict=True)
        )
        points.append((x, y))
    return points


# The parts of a head. Its pen has its origin between the eyes and the nose, and half the head's
# width as its unit.


def draw_cat_ear(pen: Pen, side: int, fur: Color, rng: random.Random) -> None:
    """Draws a pointed ear, pink inside."""
    tip = -rng.uniform(1.2, 1.4)
    pen.polygon([(side * 0.97, -0.2), (side * 0.86, tip), (side * 0.2, -0.75)], fur)
    pen.polygon([(side * 0.85, -0.5), (side * 0.82, tip + 0.25), (side * 0.42, -0.76)], EAR_PINK)


def draw_tabby_stripes(pen: Pen, marking: Color) -> None:
    """Draws stripes on the forehead and on both cheeks."""
    for x in (-0.22, 0, 0.22):
        pen.line([(x, -0.78), (x, -0.5)], 0.08, marking)
    for side in BOTH_SIDES:
        for y in (0.1, 0.28):
            pen.line([(side * 0.95, y), (side * 0.72, y)], 0.06, marking)


def draw_cat_face(pen: Pen, side: int, iris: Color, pale: Color) -> None:
    """Draws one side of a face: an eye with a slit pupil, a cheek, and whiskers."""
    eye = (side * 0.42, -0.12)
    pen.ellipse(eye, (0.23, 0.2), iris, side * 12)
    pen.ellipse(eye, (0.05, 0.18), INK)
    pen.ellipse((side * 0.17, 0.4), (0.2, 0.15), pale)
    for slope in (-0.14, 0.02, 0.18):
        pen.line([(side * 0.3, 0.38), (side * 1.3, 0.38 + slope * 1.4)], 0.02)


def draw_cat_head(pen: Pen, coat: Coat, rng: random.Random) -> None:
    for side in BOTH_SIDES:
        draw_cat_ear(pen, side, coat.fur, rng)
    pen.ellipse((0, 0), (1, 0.86), coat.fur)
    if rng.random() < 0.6:
        draw_tabby_stripes(pen, coat.marking)
    iris = rng.choice(CAT_EYES)
    for side in BOTH_SIDES:
        draw_cat_face(pen, side, iris, coat.pale)
    pen.polygon([(-0.1, 0.2), (0.1, 0.2), (0, 0.31)], NOSE_PINK)


def draw_dog_ear(pen: Pen, side: int, marking: Color, rng: random.Random) -> None:
    """Draws a hanging ear."""
    length = rng.uniform(0.62, 0.78)
    angle = side * rng.uniform(-22, -8)
    pen.ellipse((side * 0.86, 0.05), (0.28, length), marking, angle)


def draw_muzzle(pen: Pen, pale: Color) -> None:
    """Draws a muzzle with a big nose that gleams."""
    pen.ellipse((0, 0.48), (0.5, 0.42), pale)
    pen.ellipse((0, 0.27), (0.22, 0.15), DOG_NOSE)
    pen.ellipse((-0.07, 0.22), (0.05, 0.03), GLEAM)


def draw_dog_face(pen: Pen, side: int, marking: Color) -> None:
    """Draws one side of a face: half a mouth, an eye that gleams, and an eyebrow."""
    pen.line(curve((0, 0.58), (side * 0.2, 0.78), (side * 0.36, 0.56)), 0.04)
    eye = side * 0.33
    pen.ellipse((eye, -0.18), (0.12, 0.14), DOG_EYE)
    pen.ellipse((eye - 0.04, -0.23), (0.04, 0.04), WHITE)
    pen.line([(side * 0.2, -0.44), (side * 0.45, -0.42)], 0.06, marking)


def draw_dog_head(pen: Pen, coat: Coat, rng: random.Random) -> None:
    pen.ellipse((0, 0), (0.82, 0.92), coat.fur)
    patch = rng.choice((-1, 0, 0, 1))
    if patch:
        pen.ellipse((patch * 0.36, -0.2), (0.32, 0.38), coat.marking)
    for side in BOTH_SIDES:
        draw_dog_ear(pen, side, coat.marking, rng)
    if rng.random() < 0.7:
        pen.ellipse((0, 0.92), (0.17, 0.3), TONGUE)
        pen.line([(0, 0.8), (0, 1.05)], 0.03)
    draw_muzzle(pen, coat.pale)
    for side in BOTH_SIDES:
        draw_dog_face(pen, side, coat.marking)


# The whole animal


def draw_sitting_body(pen: Pen, coat: Coat, width: float) -> None:
    pen.ellipse((200, 290), (width, 95), coat.fur)
    pen.ellipse((200, 280), (42, 62), coat.pale)
    for side in BOTH_SIDES:
        pen.ellipse((200 + side * 68, 358), (42, 26), coat.fur)
        front_leg = 200 + side * 26
        pen.limb([(front_leg, 290), (front_leg, 366)], 30, coat.fur)


def draw_sitting_cat(pen: Pen, coat: Coat, rng: random.Random) -> None:
    tail = curve((255, 350), (385, 370), (345, rng.uniform(200, 260)))
    pen.limb(tail, 22, coat.fur)
    draw_sitting_body(pen, coat, 82)
    draw_cat_head(pen.at(200, 140, 78), coat, rng)


def draw_sitting_dog(pen: Pen, coat: Coat, collar: Color, rng: random.Random) -> None:
    tail = curve((260, 330), (320, 330), (335, 275))
    pen.limb(tail, 26, coat.marking)
    draw_sitting_body(pen, coat, 92)
    pen.limb([(160, 215), (200, 228), (240, 215)], 12, collar)
    pen.ellipse((200, 240), (10, 10), GOLD)
    draw_dog_head(pen.at(200, 140, 78), coat, rng)


def draw_standing_legs(pen: Pen, first: float, top: float, width: float, fill: Color) -> None:
    """Draws the two legs of one side."""
    for x in (first, first + 120):
        pen.limb([(x, top), (x, 370)], width, fill)


def draw_standing_cat(pen: Pen, coat: Coat, rng: random.Random) -> None:
    tail = curve((305, 240), (395, 250), (rng.uniform(340, 380), 90))
    pen.limb(tail, 18, coat.fur)
    draw_standing_legs(pen, 150, 270, 24, coat.marking)
    pen.ellipse((215, 255), (115, 58), coat.fur)
    for x in (200, 234, 268):
        stripe = curve((x, 204), (x + 8, 225), (x, 246))
        pen.line(stripe, 9, coat.marking)
    draw_standing_legs(pen, 175, 280, 26, coat.fur)
    draw_cat_head(pen.at(115, 160, 68), coat, rng)


def draw_standing_dog(pen: Pen, coat: Coat, collar: Color, rng: random.Random) -> None:
    tail = curve((305, 230), (345, 215), (352, 165))
    pen.limb(tail, 24, coat.marking)
    draw_standing_legs(pen, 150, 270, 24, coat.marking)
    pen.ellipse((215, 255), (115, 66), coat.fur)
    for spot, width in (((200, 240), 20), ((242, 254), 17), ((284, 240), 14)):
        pen.ellipse(spot, (width, 15), coat.marking)
    draw_standing_legs(pen, 175, 280, 26, coat.fur)
    pen.limb([(110, 205), (135, 226), (165, 222)], 12, collar)
    draw_dog_head(pen.at(115, 160, 68), coat, rng)


def draw_animal(kind: str, rng: random.Random) -> Image.Image:
    """Returns a cat or a dog on a transparent square: its head alone, sitting, or standing."""
    image = Image.new('RGBA', (SIDE * OVERSAMPLING,) * 2)
    pen = Pen(ImageDraw.Draw(image))
    coat = rng.choice(COATS)
    collar = rng.choice(COLLARS)
    match kind, rng.choice(('head', 'sitting', 'standing')):
        case 'cat', 'head':
            draw_cat_head(pen.at(200, 215, 125), coat, rng)
        case 'cat', 'sitting':
            draw_sitting_cat(pen, coat, rng)
        case 'cat', 'standing':
            draw_standing_cat(pen, coat, rng)
        case 'dog', 'head':
            draw_dog_head(pen.at(200, 215, 125), coat, rng)
        case 'dog', 'sitting':
            draw_sitting_dog(pen, coat, collar, rng)
        case 'dog', 'standing':
            draw_standing_dog(pen, coat, collar, rng)
    return image


# What is behind it


def draw_gradient(size: tuple[int, int], top: Color, bottom: Color) -> Image.Image:
    """Returns an image whose color runs from one at the top into another."""
    mask = Image.linear_gradient('L').resize(size)
    return Image.composite(Image.new('RGB', size, bottom), Image.new('RGB', size, top), mask)


def pick_color(low: int, high: int, rng: random.Random) -> Color:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def draw_cloud(draw: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    """Draws three ellipses side by side that overlap."""
    for middle in (x - size, x, x + size):
        draw.ellipse((middle - size, y - size // 2, middle + size, y + size // 2), 'white')


def draw_meadow(width: int, height: int, horizon: int, rng: random.Random) -> Image.Image:
    picture = draw_gradient((width, height), *SKY)
    picture.paste(draw_gradient((width, height - horizon), *GRASS), (0, horizon))
    draw = ImageDraw.Draw(picture)
    for _ in range(3):
        x, y = rng.randint(0, width), rng.randint(0, horizon // 2)
        draw_cloud(draw, x, y, rng.randint(14, 34))
    for _ in range(60):
        x, y = rng.randint(0, width), rng.randint(horizon, height)
        tip = (x + rng.randint(-3, 3), y - 8)
        draw.line([(x, y), tip], BLADE, 2)
    return picture


def draw_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """Returns a meadow, a room, or a wall."""
    horizon = int(height * rng.uniform(0.45, 0.75))
    place = rng.choice(('meadow', 'room', 'wall'))
    if place == 'meadow':
        return draw_meadow(width, height, horizon, rng)
    darkest = 110 if place == 'wall' else 170
    lightest = 250 if place == 'wall' else 245
    top, bottom = (pick_color(darkest, lightest, rng) for _ in range(2))
    picture = draw_gradient((width, height), top, bottom)
    if place == 'room':
        picture.paste(draw_gradient((width, height - horizon), *FLOOR), (0, horizon))
    return picture


def draw_image(kind: str, seed: int) -> Image.Image:
    """Returns an image of a cat or a dog, 240 to 480 pixels wide and high.

    It is the same for the same seed.
    """
    rng = random.Random(f'{kind} {seed}')
    width, height = rng.randint(240, 480), rng.randint(240, 480)
    picture = draw_background(width, height, rng)
    size = int(min(width, height) * rng.uniform(0.85, 1.05))
    animal = draw_animal(kind, rng)
    animal = animal.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        animal = animal.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    animal = animal.resize((size, size), Image.Resampling.LANCZOS)
    x = int((width - size) * rng.uniform(0.3, 0.7))
    y = int((height - size) * rng.uniform(0.3, 0.7))
    picture.paste(animal, (x, y), animal)
    return picture


def is_free(folder: pathlib.Path) -> bool:
    """Tells whether another folder can take the place of this one: it is missing, or empty."""
    if folder.is_symlink() or os.path.ismount(folder):
        return False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def main(output_dir: pathlib.Path) -> None:
    """Draws both folders. If one of them is not free, it ends with an error and draws nothing."""
    folders = [output_dir / kind for kind in ('cat', 'dog')]
    for folder in folders:
        if not is_free(folder):
            advice = 'Move it away, or name another --output_dir.'
            sys.exit(f'ERROR: {folder} exists, and is not an empty folder. {advice}')
    output_dir.mkdir(parents=True, exist_ok=True)
    # The next run would take half of the images for all of them. So they get their place when all
    # are drawn.
    with tempfile.TemporaryDirectory(prefix='.drawing-', dir=output_dir) as unfinished:
        for folder in folders:
            drawn = pathlib.Path(unfinished, folder.name)
            drawn.mkdir()
            for seed in range(COUNT):
                image = draw_image(folder.name, seed)
                image.save(drawn / f'{folder.name}.{seed}.jpg', quality=90)
        for folder in folders:
            if folder.exists():
                folder.rmdir()  # Windows does not rename to a folder that is empty
            pathlib.Path(unfinished, folder.name).rename(folder)
    drew = f'Drew {COUNT} cats and {COUNT} dogs in {output_dir}.'
    print(f'{drew} Train on them with --image_dir={output_dir}/')


if __name__ == '__main__':
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be closed
        sys.stdout.reconfigure(errors='replace')
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = pathlib.Path(__file__).resolve().parent.parent / 'data'
    parser.add_argument(
        '--output_dir', metavar='DIR', type=pathlib.Path, default=data, help='default: %(default)s'
    )
    output_dir = parser.parse_args().output_dir
    try:
        main(output_dir)
    except KeyboardInterrupt:
        print('\nStopped. Nothing was drawn: run the same command again.', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # such as a full disk
        problem = f'the images cannot be written into {output_dir} ({error})'
        sys.exit(f'ERROR: {problem}. Fix this, and run the same command again.')
