"""Draw the reference emoji that nearest.py compares with: one sheet of 64 px cells, with transparency.

Needs Noto Color Emoji (SIL Open Font License 1.1; Debian: fonts-noto-color-emoji). The sheet is in the repository.
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
KNOWN = {
    "umbrella": "☂️", "soccer ball": "⚽", "sailboat": "⛵", "snowflake": "❄️", "evergreen tree": "🌲", "cactus": "🌵",
    "tulip": "🌷", "sunflower": "🌻", "mushroom": "🍄", "banana": "🍌", "pineapple": "🍍", "red apple": "🍎",
    "cherries": "🍒", "strawberry": "🍓", "slice of pizza": "🍕", "balloon": "🎈", "guitar": "🎸", "trophy": "🏆",
    "dog": "🐕", "elephant": "🐘", "octopus": "🐙", "penguin": "🐧", "rabbit face": "🐰", "cat face": "🐱",
    "pig face": "🐷", "panda face": "🐼", "crown": "👑", "ghost": "👻", "skull": "💀", "bomb": "💣", "lock": "🔒",
    "bell": "🔔", "fire engine": "🚒", "automobile": "🚗", "tractor": "🚜", "robot face": "🤖", "lion face": "🦁",
    "unicorn face": "🦄", "butterfly": "🦋", "teddy bear": "🧸",
}  # fmt: skip
OTHERS = {
    "rocket": "🚀", "turtle": "🐢", "hamburger": "🍔", "otter": "🦦", "beaver": "🦫", "turkey": "🦃", "mango": "🥭",
    "coffee": "☕", "violin": "🎻", "snail": "🐌",
}  # fmt: skip

if __name__ == "__main__":
    font = ImageFont.truetype(FONT, 109)
    names = list(KNOWN) + list(OTHERS)
    sheet = Image.new("RGBA", (10 * 64, 5 * 64))
    for i, text in enumerate([*KNOWN.values(), *OTHERS.values()]):
        cell = Image.new("RGBA", (150, 150))
        ImageDraw.Draw(cell).text((5, 5), text, font=font, embedded_color=True)
        cell = cell.crop(cell.getbbox())
        cell.thumbnail((64, 64), Image.Resampling.LANCZOS)
        sheet.paste(cell, (i % 10 * 64 + (64 - cell.width) // 2, i // 10 * 64 + (64 - cell.height) // 2))
    here = Path(__file__).parent
    sheet.save(here / "emoji.png", optimize=True)
    (here / "emoji.json").write_text(json.dumps(names, indent=1) + "\n")
