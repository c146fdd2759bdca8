"""Draw the pictures of this folder: cards on a table, as if photographed, with captions as people write them.

    python examples/draw.py FOLDER

writes FOLDER/photos and FOLDER/captions.csv. The cards are drawn scenes of `modeling_dclip.data.scenes`. Table, lamp
light, tilt, blur and noise are drawn here, so everything is free of licences, and new to the small CLIP in
`recipes/demo_anchor`, which knows bright upright scenes. A caption is a true sentence about the card.
"""

import csv
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from modeling_dclip.data.scenes.drawing import coarse_caption, detailed_captions, draw_scene, random_scene

CARDS = 180
TABLES = {"kitchen": ((96, 62, 38), (120, 86, 58), (150, 120, 92)), "workshop": ((92, 98, 106), (110, 122, 108))}
QUALITY = 75  # of JPEG
FORMATS = ((200, 150), (150, 200), (160, 160))  # width and height in pixels
PEOPLE = ("Ada", "Noor", "Jun", "")


def photograph(card: Image.Image, table: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """A card on a table under a lamp, tilted and a little blurred."""
    width, height = rng.choice(FORMATS)
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    bends = 2.5 * np.sin(3 * columns / width), 2.5 * np.sin(5 * columns / width)
    grain = np.sin(rows * rng.uniform(0.25, 0.5) + bends[0]) + np.sin(rows * rng.uniform(0.6, 1.1) + bends[1])
    picture = Image.fromarray(np.clip(np.array(table) + 6 * grain[..., None], 0, 255).astype(np.uint8))

    side = int(rng.uniform(0.86, 0.96) * min(width, height))
    tilted = card.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    tilted = tilted.rotate(rng.uniform(-8, 8), expand=True, resample=Image.Resampling.BICUBIC)
    left = (width - tilted.width) // 2 + rng.randint(-3, 3)
    top = (height - tilted.height) // 2 + rng.randint(-3, 3)
    shadow = Image.new("L", (width, height))
    shadow.paste(tilted.getchannel("A").point(lambda value: int(0.6 * value)), (left + 4, top + 5))
    picture.paste((12, 8, 6), (0, 0, width, height), shadow.filter(ImageFilter.GaussianBlur(4)))
    picture.paste(tilted, (left, top), tilted)

    lamp = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
    distance = np.hypot(columns - lamp[0], rows - lamp[1]) / max(width, height)
    colour = (1.0, 0.93, 0.8) if rng.random() < 0.6 else (0.9, 0.96, 1.0)
    light = (1.1 - 0.45 * distance)[..., None] * np.array(colour)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, (height, width, 1))
    lit = 255 * np.clip(np.asarray(picture) / 255 * light, 0, 1) ** 1.2 + noise
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def as_people_write(caption: str, rng: random.Random) -> str:
    """The same words with a capital letter, a full stop or a few words before them, or as they are."""
    caption = caption.replace(" , ", ", ").replace(" : ", ": ")
    return rng.choice((caption, caption, caption, caption.capitalize() + ".", f"photo of {caption}"))


def draw_card(number: int) -> tuple[str, Image.Image, list[str]]:
    """File name, picture and one to four captions of a card."""
    rng = random.Random(f"examples/{number}")
    scene = random_scene(rng)
    card, _ = draw_scene(scene, rng, 160)
    room = rng.choice(tuple(TABLES))
    picture = photograph(card, rng.choice(TABLES[room]), rng)
    captions = detailed_captions(scene, rng, rng.choice((1, 2, 2, 3)))
    if rng.random() < 0.2:
        captions.append(coarse_caption(scene, rng))
    return f"{room}/IMG_{number:04}.jpg", picture, [as_people_write(caption, rng) for caption in captions]


def write_cards(folder: Path) -> None:
    """Write the pictures and their table."""
    for room in TABLES:
        (folder / "photos" / room).mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "caption", "photographer"])
        for name, picture, captions in map(draw_card, range(CARDS)):
            picture.save(folder / "photos" / name, quality=QUALITY, optimize=True)
            photographer = random.Random(name).choice(PEOPLE)
            table.writerows([name, caption, photographer] for caption in captions)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"{__doc__}\nExpected one word after examples/draw.py, the folder to write to.")
    write_cards(Path(sys.argv[1]))
