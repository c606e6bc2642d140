"""Image files of every kind, mostly of one color, and the color that a network should see."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, features

WIDTH, HEIGHT = 6, 4
COLOR, GRAY = (200, 100, 50), 200
HALF = 128  # alpha
OVER_BLACK = tuple(round(value * HALF / 255) for value in COLOR)
GRAY_OVER_BLACK = round(GRAY * HALF / 255)


class Kind(NamedTuple):
    """Args: name of the file; its content; the color all over, RGB; how far a lossy format may be from it."""

    name: str
    content: bytes
    color: tuple[int, ...]
    tolerance: int = 0


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str = "RGB", color: object = COLOR) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), color)  # type: ignore[arg-type]


def deep(value: float, dtype: type | np.dtype) -> Image.Image:
    return Image.fromarray(np.full((HEIGHT, WIDTH), value, dtype))


def palette(*colors: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    image = plain("P", 0)
    image.putpalette([value for color in colors for value in color], mode)
    return image


def png(bits: int, kind: int, samples: Iterable[int], transparent: Iterable[int] = ()) -> bytes:
    """A PNG whose pixels all have these samples; kind 0 is gray, 2 RGB, 4 gray with alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = packed(bits, list(samples) * WIDTH)
    color = b"".join(struct.pack(">H", value) for value in transparent)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, kind, 0, 0, 0))
        + (chunk(b"tRNS", color) if color else b"")
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * HEIGHT))
        + chunk(b"IEND", b"")
    )


def packed(bits: int, values: list[int]) -> bytes:
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def tiff(bits: int, row: bytes, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """A TIFF of one gray sample to a pixel, not compressed, in rows that are all the same."""
    data = row * HEIGHT
    tags = [
        *((256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)),
        *((277, 3, 1), (278, 3, HEIGHT), (279, 4, len(data)), (339, 3, sample_format)),
    ]
    directory = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'I' if kind == 4 else 'Hxx'}", value)
        for tag, kind, value in tags
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    header = magic + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + directory + bytes(4)


def ppm(magic: str, maximum: int, *samples: int) -> bytes:
    numbers = b"".join(struct.pack(">H" if maximum > 255 else ">B", value) for value in samples)
    return f"{magic}\n{WIDTH} {HEIGHT}\n{maximum}\n".encode() + numbers * (WIDTH * HEIGHT)


def frames(kind: str, mode: str = "RGB", **options) -> bytes:
    others = [plain(mode, (9, 9, 9)), plain(mode, (99, 0, 0))]
    return saved(plain(mode), kind, save_all=True, append_images=others, **options)


def kinds() -> list[Kind]:
    gray, dark = (GRAY,) * 3, (GRAY_OVER_BLACK,) * 3
    rgba, la = plain("RGBA", (*COLOR, HALF)), plain("LA", (GRAY, HALF))
    white, black = (255,) * 3, (0,) * 3
    words = [value * 257 for value in COLOR]
    sixteen = struct.pack("<H", GRAY * 257) * WIDTH
    return [
        Kind("1.png", saved(plain("1", 1), "PNG"), white),
        Kind("L.png", saved(plain("L", GRAY), "PNG"), gray),
        Kind("LA.png", saved(la, "PNG"), dark),
        Kind("P.png", saved(palette(COLOR), "PNG"), COLOR),
        Kind("P-one-transparent.png", saved(palette(COLOR, (1, 2, 3)), "PNG", transparency=0), black),
        Kind("P-alphas.png", saved(palette(COLOR), "PNG", transparency=bytes([HALF])), OVER_BLACK),
        Kind("P-opaque.png", saved(palette(COLOR), "PNG", transparency=b"\xff"), COLOR),
        Kind("RGB.png", saved(plain(), "PNG"), COLOR),
        Kind("RGBA.png", saved(rgba, "PNG"), OVER_BLACK),
        Kind("opaque.png", saved(plain("RGBA", (*COLOR, 255)), "PNG"), COLOR),
        Kind("16.png", saved(deep(GRAY * 257, np.uint16), "PNG"), gray),
        Kind("16-LA.png", png(16, 4, [GRAY * 257, 0x8080]), dark),
        Kind("16-RGB.png", png(16, 2, words), COLOR),
        Kind("16-RGBA.png", png(16, 6, [*words, 0x8080]), OVER_BLACK),
        *(
            Kind(f"{bits}-tRNS-{is_it}.png", png(bits, 0, [value], [value if is_it else 0]), color)
            for bits, value in ((1, 1), (2, 3), (4, 15), (8, 255), (16, 65535))
            for is_it, color in ((True, black), (False, white))
        ),
        Kind("RGB-tRNS.png", png(8, 2, COLOR, COLOR), black),
        Kind("RGB-other-tRNS.png", png(8, 2, COLOR, (1, 2, 3)), COLOR),
        Kind("16-RGB-tRNS.png", png(16, 2, words, words), black),
        Kind("16-RGB-other-tRNS.png", png(16, 2, words, (1, 2, 3)), COLOR),
        Kind("apng.png", frames("PNG"), COLOR),
        Kind("L.tiff", saved(plain("L", GRAY), "TIFF"), gray),
        Kind("RGB.tiff", saved(plain(), "TIFF"), COLOR),
        Kind("lzw.tiff", saved(plain(), "TIFF", compression="tiff_lzw"), COLOR),
        Kind("RGBA.tiff", saved(rgba, "TIFF"), OVER_BLACK),
        Kind("RGBX.tiff", saved(plain("RGBX", (*COLOR, 7)), "TIFF"), COLOR),
        Kind("LA.tiff", saved(la, "TIFF"), dark),
        Kind("PA.tiff", saved(palette(COLOR).convert("PA"), "TIFF"), COLOR),
        Kind("CMYK.tiff", saved(plain("CMYK", (55, 155, 205, 0)), "TIFF"), COLOR),
        Kind("YCbCr.tiff", saved(plain().convert("YCbCr"), "TIFF"), COLOR, 2),
        Kind("LAB.tiff", saved(plain().convert("LAB"), "TIFF"), COLOR, 3),
        Kind("frames.tiff", frames("TIFF"), COLOR),
        Kind("16.tiff", tiff(16, sixteen), gray),
        Kind("16-big-endian.tiff", tiff(16, struct.pack(">H", GRAY * 257) * WIDTH, order=">"), gray),
        Kind("16-white-is-0.tiff", tiff(16, sixteen, photometric=0), (255 - GRAY,) * 3),
        Kind("16-lzw.tiff", saved(deep(GRAY * 257, np.uint16), "TIFF", compression="tiff_lzw"), gray),
        Kind("16-signed.tiff", tiff(16, struct.pack("<h", 100 * 257) * WIDTH, sample_format=2), (100,) * 3),
        Kind("12.tiff", tiff(12, packed(12, [4095] * WIDTH)), white),
        Kind("12-half.tiff", tiff(12, packed(12, [2048] * WIDTH)), (128,) * 3),
        Kind("32.tiff", tiff(32, struct.pack("<I", GRAY * 257) * WIDTH), gray),
        Kind("float.tiff", tiff(32, struct.pack("<f", GRAY / 255) * WIDTH, sample_format=3), gray),
        Kind("float-white-is-0.tiff", tiff(32, struct.pack("<f", 0.0) * WIDTH, 0, 3), white),
        Kind("L.jpg", saved(plain("L", GRAY), "JPEG"), gray, 1),
        Kind("RGB.jpg", saved(plain(), "JPEG", quality=95), COLOR, 3),
        Kind("CMYK.jpg", saved(plain("CMYK", (55, 155, 205, 0)), "JPEG", quality=95), COLOR, 4),
        Kind("progressive.jfif", saved(plain(), "JPEG", quality=95, progressive=True), COLOR, 3),
        Kind("MPO.mpo", frames("MPO", quality=95), COLOR, 3),
        Kind("MPO.JPG", frames("MPO", quality=95), COLOR, 3),
        *(
            Kind(f"{image.mode}.jp2", saved(image, "JPEG2000"), color)
            for image, color in ((plain("L", GRAY), gray), (plain(), COLOR), (rgba, OVER_BLACK), (la, dark))
        ),
        Kind("16.jp2", saved(deep(GRAY * 257, np.uint16), "JPEG2000"), gray),
        Kind("pgm.pgm", ppm("P5", 255, GRAY), gray),
        Kind("small.pgm", ppm("P5", 100, 100), white),
        Kind("odd.pgm", ppm("P5", 1000, 1000), white),
        Kind("10-bit.pgm", ppm("P5", 1023, 512), (128,) * 3),
        Kind("16.pgm", ppm("P5", 65535, GRAY * 257), gray),
        Kind("16.ppm", ppm("P6", 65535, *words), COLOR),
        Kind("text.ppm", f"P3\n{WIDTH} {HEIGHT}\n255\n{'200 100 50 ' * 24}".encode(), COLOR),
        Kind("bits.pbm", saved(plain("1", 1), "PPM"), white),
        Kind("float.pfm", saved(deep(GRAY / 255, np.float32), "PPM"), gray),
        Kind("GIF.gif", saved(palette(COLOR), "GIF"), COLOR),
        Kind("L.gif", saved(plain("L", GRAY), "GIF"), gray),
        Kind("transparent.gif", saved(palette(COLOR, (1, 2, 3)), "GIF", transparency=0), black),
        Kind("frames.gif", frames("GIF"), COLOR),
        Kind("RGB.webp", saved(plain(), "WEBP", lossless=True), COLOR),
        Kind("RGBA.webp", saved(rgba, "WEBP", lossless=True, exact=True), OVER_BLACK),
        Kind("frames.webp", frames("WEBP", lossless=True), COLOR),
        *([Kind("RGB.avif", saved(plain(), "AVIF", quality=95), COLOR, 4)] if features.check("avif") else []),
        Kind("RGB.bmp", saved(plain(), "BMP"), COLOR),
        Kind("RGBA.bmp", saved(rgba, "BMP"), COLOR),  # its fourth byte means nothing
        Kind("P.bmp", saved(palette(COLOR), "BMP"), COLOR),
        Kind("RGBA.ico", saved(rgba.resize((32, 32)), "ICO", sizes=[(32, 32)]), OVER_BLACK),
        Kind("RGBA.icns", saved(rgba.resize((32, 32)), "ICNS"), OVER_BLACK),
        Kind("RGBA.tga", saved(rgba, "TGA"), OVER_BLACK),
        Kind("RGBA.qoi", saved(rgba, "QOI"), OVER_BLACK),
        Kind("RGBA.dds", saved(rgba, "DDS"), OVER_BLACK),
        Kind("RGBA.sgi", saved(rgba, "SGI"), OVER_BLACK),
        Kind("RGB.pcx", saved(plain(), "PCX"), COLOR),
    ]
