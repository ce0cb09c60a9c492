"""Edge texts written by hand: inputs on which tokenizers, padding and pooling have been known to differ.

`EDGES` belong to verification. `SHORT_TEXTS` belong to calibration: ordinary short inputs, so that ranges are
also chosen on one token and on few. The two share no text, also after normalization.

Every text is spelt with escapes where its exact code points matter, because that is what is under test.
"""

from __future__ import annotations

from typing import Final

_COMPOSED = "Un caf\u00e9 cr\u00e8me \u00e0 No\u00ebl"
_DECOMPOSED = "Un cafe\u0301 cre\u0300me a\u0300 Noe\u0308l"
_QUESTION = "How does last-token pooling work?"

EDGES: Final[tuple[tuple[str, str, str | None, str], ...]] = (
    # (name, text, prompt name, language)
    # One token or nearly: the sequence dimension is 1 or 2 before the end token is added.
    ("one-letter", "a", None, "und"),
    ("one-accent", "\u00e9", None, "und"),
    ("one-han", "\u7684", None, "zho"),
    ("one-emoji", "\U0001f642", None, "zxx"),
    ("one-digit", "1", None, "zxx"),
    ("one-period", ".", None, "zxx"),
    ("one-word", "the", None, "eng"),
    ("one-word-query", "python", "query", "eng"),
    # Nothing visible. With a prompt, an empty text is the prompt alone.
    ("empty", "", None, "zxx"),
    ("empty-query", "", "query", "zxx"),
    ("space", " ", None, "zxx"),
    ("spaces", " " * 7, None, "zxx"),
    ("newline", "\n", None, "zxx"),
    ("newlines", "\n" * 12, None, "zxx"),
    ("tab", "\t", None, "zxx"),
    ("no-break-space", "\u00a0", None, "zxx"),
    ("ideographic-space", "\u3000", None, "zxx"),
    ("zero-width-space", "\u200b", None, "zxx"),
    ("byte-order-mark", "\ufeff", None, "zxx"),
    ("control-characters", "bell \x07 escape \x1b[0m start \x01 delete \x7f next line \x85 end", None, "eng"),
    # Sequences that must not be taken apart differently on two sides.
    ("emoji-family", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", None, "zxx"),
    (
        "emoji-skin-and-flags",
        "\U0001f44d\U0001f3fd \U0001f1ef\U0001f1f5\U0001f1e7\U0001f1f7 1\ufe0f\u20e3",
        None,
        "zxx",
    ),
    ("composed", _COMPOSED, None, "fra"),
    ("decomposed", _DECOMPOSED, None, "fra"),
    ("decomposed-hangul", "\u1112\u1161\u11ab\u1100\u1173\u11af", None, "kor"),
    ("stacked-marks", "z\u0300\u0317\u0335a\u0301\u0316l\u0308\u0323g\u030a\u0325o\u0304\u0331", None, "zxx"),
    ("compatibility-forms", "\ufb01ne \uff21\uff22\uff23 \u2460 \u00bd \u33a1 \u2167", None, "und"),
    (
        "mathematical-letters",
        "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522",
        None,
        "und",
    ),
    ("rare-han", "\U00020000\U0002a6d6\u9f98", None, "zho"),
    ("private-use", "before \ue000\uf8ff after \ufffd", None, "eng"),
    (
        "right-to-left",
        "\u200f\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd\u200f, 3.5 km \u200ework\u200e "
        "\u0633\u064e\u0644\u0627\u0645\u064c",
        None,
        "und",
    ),
    (
        "bidi-embedding",
        "\u202bABC \u0627\u0644\u0628\u064a\u0627\u0646\u0627\u062a 123\u202c \u2066x\u2069",
        None,
        "und",
    ),
    # Shapes of text rather than characters.
    ("repeated-word", " ".join(["vector"] * 300), None, "eng"),
    ("long-word", "antidisestablishmentarianism" * 60, None, "eng"),
    ("long-han-run", "\u8a9e" * 400, None, "zho"),
    ("digits", "31415926535897932384626433832795028841971" * 8, None, "zxx"),
    ("grouped-numbers", "1,234,567.89 1.234.567,89 1 234 567,89 0x7fff 1e-12 -0.0 12:59:60", None, "zxx"),
    ("punctuation", "?!... --- ((([[[{{{}}}]]]))) //\\\\ @@@ ### $$$ %%% ^^^ &&& *** ~~~ ```", None, "zxx"),
    ("url", "https://example.org/a/b%20c?q=caf%C3%A9&page=2&sort=-date#section-3", None, "zxx"),
    ("html", '<p class="note">Fish &amp; chips &lt;today&gt;<br/>\n<!-- hidden --></p>', None, "eng"),
    ("json", '{"id": 7, "tags": ["a", "b"], "nested": {"null": null, "escaped": "\\u00e9\\n"}}', None, "zxx"),
    ("base64", "Rm9yIGEgcmVhZGVyIG9mIHRva2VucywgdGhpcyBpcyBhIHNpbmdsZSB3b3JkLg==", None, "zxx"),
    ("table", "| name | dim |\n| --- | ---: |\n| small | 256 |\n| large | 4096 |\n", None, "eng"),
    ("surrounding-whitespace", "  \t kept on both sides \n ", None, "eng"),
    ("crlf", "first line\r\nsecond line\r\n\r\nlast line\r\n", None, "eng"),
    ("other-line-ends", "carriage\rreturn\x0bvertical\x0cform\u2028separator\u2029end", None, "eng"),
    ("upper-case", "WHY DOES THE SAME QUESTION IN CAPITALS GIVE ANOTHER VECTOR?", "query", "eng"),
    (
        "mixed-languages",
        "Die \u30b5\u30fc\u30d0\u30fc returned \u043e\u0448\u0438\u0431\u043a\u0443 500 \u6642, pourquoi ?",
        "query",
        "und",
    ),
    # Strings that are special tokens where a tokenizer parses them out of the text.
    ("special-end", "<|im_end|>", None, "zxx"),
    ("special-inside", "one <|endoftext|> two <|im_end|> three", None, "eng"),
    ("special-chat", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", None, "eng"),
    # One text under each prompt, and one that spells a prompt itself.
    ("prompt-none", _QUESTION, None, "eng"),
    ("prompt-query", _QUESTION, "query", "eng"),
    ("prompt-document", _QUESTION, "document", "eng"),
    ("prompt-spelt-out", "Instruct: Find the passage.\nQuery: " + _QUESTION, None, "eng"),
)

SHORT_TEXTS: Final[tuple[tuple[str, str, str | None, str], ...]] = (
    # (name, text, prompt name, language). The first eight are one token each.
    ("letter", "x", None, "und"),
    ("digit", "7", None, "zxx"),
    ("comma", ",", None, "zxx"),
    ("brace", "{", None, "zxx"),
    ("han", "\u4e0d", None, "zho"),
    ("cyrillic", "\u0438", None, "rus"),
    ("word", "and", None, "eng"),
    ("word-query", "data", "query", "eng"),
    ("two-words", "error log", "query", "eng"),
    ("question", "who wrote this?", "query", "eng"),
    ("question-han", "\u8c01\u5199\u7684\uff1f", "query", "zho"),
    ("question-kana", "\u3053\u308c\u306f\u4f55\u3067\u3059\u304b\u3002", "query", "jpn"),
    ("emoji", "\U0001f680\U0001f525 \U0001f602", None, "zxx"),
    ("version", "v2.13.0-rc1+build.77", None, "zxx"),
    ("address", "10.0.0.1:8080", None, "zxx"),
    ("link", "https://example.com/docs/search?lang=pt#top", None, "zxx"),
    ("path", "/var/lib/app/data-2024.tar.gz", None, "zxx"),
    ("amounts", "12 345,67 EUR; 98.6 F; 3/4; -40 \u00b0C", None, "zxx"),
    ("markup", '<a href="#x">next &raquo;</a>', "document", "eng"),
    ("record", '{"user": 42, "ok": true, "items": [], "note": "caf\\u00e9"}', "document", "zxx"),
    ("command", "tar -xzf data.tar.gz && cd data && ls -la | head", "document", "zxx"),
    ("list", "- one\n- two\n- three\n", "document", "eng"),
    ("capitals", "DO NOT OPEN UNTIL FRIDAY", "document", "eng"),
    ("untagged-sentence", "A plain sentence that no prompt stands before.", None, "eng"),
)
