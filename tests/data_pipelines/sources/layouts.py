"""Draws pictures of one layout that differ in what they say."""

import math
import random

from PIL import Image, ImageDraw, ImageFont

SIZE = (480, 320)


def _font(size):
  return ImageFont.load_default(size)


def _page(width=SIZE[0], height=SIZE[1]):
  image = Image.new("RGB", (width, height), "white")
  return image, ImageDraw.Draw(image)


def _words(rng, count):
  letters = "abcdefghijklmnopqrstuvwxyz"
  return [
    "".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(count)
  ]


def table(seed):
  """A table of six rows: words on the left, numbers on the right."""
  rng = random.Random(seed)
  image, draw = _page()
  for row, word in enumerate(_words(rng, 6)):
    top = 20 + 45 * row
    draw.rectangle((40, top, 440, top + 45), outline="black", width=2)
    draw.line((240, top, 240, top + 45), fill="black", width=2)
    draw.text((60, top + 12), word.title(), fill="black", font=_font(18))
    number = str(rng.randint(10, 999))
    draw.text((270, top + 12), number, fill="black", font=_font(18))
  return image


def plot(seed):
  """A curve on a grid that is always the same."""
  rng = random.Random(seed)
  image, draw = _page(400, 400)
  for at in range(0, 401, 40):
    color = "black" if at == 200 else "lightgrey"
    draw.line((at, 0, at, 400), fill=color)
    draw.line((0, at, 400, at), fill=color)
  a, b, c = rng.uniform(-1, 1), rng.uniform(-2, 2), rng.uniform(-3, 3)
  points = [
    (x, 200 - 40 * (a * t * t / 2 + b * math.sin(t) + c))
    for x in range(0, 400, 2)
    for t in [(x - 200) / 40]
  ]
  draw.line(points, fill="blue", width=2)
  return image


def triangle(seed):
  """The same right triangle with other lengths at its sides."""
  rng = random.Random(seed)
  image, draw = _page(320, 240)
  draw.line((40, 200, 280, 200, 40, 40, 40, 200), fill="black", width=2)
  for place in ((140, 205), (10, 110), (170, 100)):
    text = str(rng.randint(3, 40))
    draw.text(place, text, fill="black", font=_font(16))
  return image


def clock(seed):
  """A clock face with hands at another time."""
  rng = random.Random(seed)
  image, draw = _page(300, 300)
  draw.ellipse((30, 30, 270, 270), outline="black", width=3)
  for hour in range(1, 13):
    angle = math.tau * hour / 12
    place = (150 + 100 * math.sin(angle), 150 - 100 * math.cos(angle))
    draw.text(place, str(hour), fill="black", font=_font(16), anchor="mm")
  minutes = rng.randrange(720)
  for turns, length, width in ((minutes / 720, 55, 5), (minutes / 60, 85, 3)):
    angle = math.tau * turns
    tip = (150 + length * math.sin(angle), 150 - length * math.cos(angle))
    draw.line(((150, 150), tip), fill="black", width=width)
  return image


def text_page(seed):
  """A page of text."""
  rng = random.Random(seed)
  image, draw = _page(400, 300)
  for line in range(11):
    words = " ".join(_words(rng, 8))[:45]
    draw.text((20, 15 + 25 * line), words, fill="black", font=_font(14))
  return image


def bars(seed):
  """A bar chart of five bars on the same axes."""
  rng = random.Random(seed)
  image, draw = _page()
  draw.line((40, 20, 40, 290, 460, 290), fill="black", width=2)
  for i in range(5):
    left, height = 70 + 78 * i, rng.randint(20, 240)
    draw.rectangle((left, 290 - height, left + 40, 289), fill="steelblue")
  return image


LAYOUTS = {
  each.__name__: each
  for each in (table, plot, triangle, clock, text_page, bars)
}
