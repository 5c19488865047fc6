"""The programming language of a file, by its name and its first line; notebooks as markdown.

A table of suffixes, a table of whole names, and the interpreter that a `#!` line calls; else it is "und".
"""

import json
import re

import pyarrow as pa

from data_pipelines.document import SCHEMA, Outcome, with_text

UNKNOWN = "und"
SUFFIXES = {
    suffix: language
    for language, suffixes in {
        "ada": ".adb .ads", "assembly": ".asm .s", "awk": ".awk", "batch": ".bat .cmd", "c": ".c .h",
        "clojure": ".clj .cljs .cljc", "cmake": ".cmake", "coffeescript": ".coffee", "cpp":
        ".cc .cpp .cxx .c++ .hh .hpp .hxx .inl .ipp .tpp .cu .cuh", "crystal": ".cr", "csharp": ".cs .csx",
        "css": ".css", "csv": ".csv .tsv", "cython": ".pyx .pxd .pxi", "d": ".d .di", "dart": ".dart",
        "elixir": ".ex .exs", "elm": ".elm", "erlang": ".erl .hrl", "fortran": ".f .f77 .f90 .f95 .f03 .f08 .for",
        "fsharp": ".fs .fsi .fsx", "glsl": ".glsl .vert .frag .comp", "go": ".go", "graphql": ".graphql .gql",
        "groovy": ".groovy .gradle", "haskell": ".hs .lhs", "haxe": ".hx", "html": ".html .htm .xhtml",
        "ini": ".ini .cfg .conf .properties", "java": ".java", "javascript": ".js .mjs .cjs .jsx", "json":
        ".json .geojson .jsonc", "julia": ".jl", "kotlin": ".kt .kts", "latex": ".tex .sty .cls", "less": ".less",
        "lisp": ".lisp .lsp .cl .el", "lua": ".lua", "makefile": ".mk .mak", "markdown": ".md .markdown .mdx",
        "matlab": ".m", "nim": ".nim", "nix": ".nix", "notebook": ".ipynb", "objectivecpp": ".mm",
        "ocaml": ".ml .mli", "pascal": ".pas .pp", "perl": ".pl .pm .t", "php": ".php .phtml", "powershell":
        ".ps1 .psm1 .psd1", "prolog": ".pro", "protobuf": ".proto", "python": ".py .pyi .pyw", "r": ".r",
        "racket": ".rkt", "rst": ".rst", "ruby": ".rb .rake .gemspec", "rust": ".rs", "sass": ".scss .sass",
        "scala": ".scala .sc .sbt", "scheme": ".scm .ss", "shell": ".sh .bash .zsh .ksh .fish", "smalltalk": ".st",
        "solidity": ".sol", "sql": ".sql .psql", "starlark": ".bzl .bazel", "svelte": ".svelte", "swift": ".swift",
        "tcl": ".tcl", "terraform": ".tf .hcl", "text": ".txt", "thrift": ".thrift", "toml": ".toml", "typescript":
        ".ts .tsx .mts .cts", "verilog": ".v .vh .sv .svh", "vhdl": ".vhd .vhdl", "vimscript": ".vim",
        "visualbasic": ".vb .bas", "vue": ".vue", "webassembly": ".wat .wast", "xml": ".xml .xsd .xsl .xslt .svg",
        "yaml": ".yaml .yml", "zig": ".zig",
    }.items()
    for suffix in suffixes.split()
}  # fmt: skip
NAMES = {
    "makefile": "makefile", "gnumakefile": "makefile", "dockerfile": "dockerfile", "containerfile": "dockerfile",
    "cmakelists.txt": "cmake", "rakefile": "ruby", "gemfile": "ruby", "vagrantfile": "ruby", "jenkinsfile": "groovy",
    "build": "starlark", "workspace": "starlark", "sconstruct": "python", "sconscript": "python", "wscript": "python",
    "go.mod": "gomod", "cargo.lock": "toml", "pipfile": "toml", ".bashrc": "shell", ".profile": "shell",
    ".zshrc": "shell", ".vimrc": "vimscript", "justfile": "makefile",
}  # fmt: skip
INTERPRETERS = {
    "python": "python", "pypy": "python", "sh": "shell", "bash": "shell", "zsh": "shell", "ksh": "shell",
    "dash": "shell", "fish": "shell", "node": "javascript", "nodejs": "javascript", "deno": "typescript",
    "bun": "typescript", "perl": "perl", "ruby": "ruby", "lua": "lua", "luajit": "lua", "php": "php",
    "rscript": "r", "tclsh": "tcl", "wish": "tcl", "awk": "awk", "gawk": "awk", "groovy": "groovy", "julia": "julia",
    "make": "makefile", "osascript": "applescript", "pwsh": "powershell", "escript": "erlang", "elixir": "elixir",
    "runhaskell": "haskell", "ocaml": "ocaml", "scala": "scala", "guile": "scheme", "racket": "racket",
}  # fmt: skip
PROSE = frozenset({"markdown", "rst", "text", "latex", "html", "notebook"})
"""Languages of documents: such a file is no code file and comes before the code of its folder."""
DATA = frozenset({"json", "csv", "xml", "ini", "toml", "yaml", "gomod"})
"""Languages that hold settings and records and no program."""

SHEBANG = re.compile(r"#![ \t]*(\S+)(?:[ \t]+(.*))?")
OBJECTIVE_C = re.compile(r"^\s*(?:@interface|@implementation|@protocol|@import|#import)\b", re.MULTILINE)
CPP_HEADER = re.compile(r"^\s*(?:class\s+\w+|namespace\b|template\s*<|using\s+\w|(?:public|private|protected):)", re.M)


def language_of(path: str, text: str = "") -> str:
    """Returns the language of a file: by its whole name, its suffix, else its `#!` line; "und" where none is known.

    Two suffixes have two languages each: a .h with classes, namespaces or templates is C++, and a .h or .m with
    Objective-C's directives is Objective-C.
    """
    name = path.rpartition("/")[2].lower()
    if name in NAMES:
        return NAMES[name]
    if name.startswith(("dockerfile.", "makefile.")):
        return NAMES[name.partition(".")[0]]
    stem, dot, suffix = name.rpartition(".")
    language = SUFFIXES.get(dot + suffix) if stem else None
    if language is None:
        return _by_first_line(text)
    if suffix in ("h", "m") and OBJECTIVE_C.search(text):
        return "objectivec"
    return "cpp" if suffix == "h" and CPP_HEADER.search(text) else language


def _by_first_line(text: str) -> str:
    found = SHEBANG.match(text)
    if not found:
        return UNKNOWN
    command, arguments = found.group(1).rpartition("/")[2], (found.group(2) or "").split()
    if command == "env":
        # `env -S`, `env -i`, `env NAME=value`: the first word that is neither an option nor a variable.
        command = next((word for word in arguments if not word.startswith("-") and "=" not in word), "")
    return INTERPRETERS.get(re.sub(r"[\d.]+$", "", command.rpartition("/")[2].lower()), UNKNOWN)


def notebook_markdown(text: str) -> str:
    """Returns a Jupyter notebook as markdown: its text cells as they are, its code cells fenced, outputs left out.

    Raises ValueError where the text is no notebook.
    """
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a notebook: {error}; wanted the JSON of an .ipynb file") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if cells is None and isinstance(notebook, dict):  # formats 1 to 3 have sheets
        cells = [cell for sheet in notebook.get("worksheets") or [] for cell in sheet.get("cells", [])]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise ValueError("not a notebook: there is no list of cells; wanted the JSON of an .ipynb file")
    metadata = notebook.get("metadata") or {}
    language = (metadata.get("kernelspec") or {}).get("language") or (metadata.get("language_info") or {}).get("name")
    pieces = []
    for cell in cells:
        source = cell.get("source", cell.get("input", ""))
        source = "".join(source) if isinstance(source, list) else str(source)
        if not source.strip():
            continue
        if cell.get("cell_type") == "code":
            pieces.append(fenced(source, str(language or "python")))
        else:
            pieces.append(source.rstrip("\n") + "\n")
    return "\n".join(pieces)


FENCE = re.compile(r"^`{3,}", re.MULTILINE)


def fenced(text: str, language: str) -> str:
    """Returns the text, byte for byte, between fences that are longer than any in it."""
    fence = "`" * max(3, max((len(run) + 1 for run in FENCE.findall(text)), default=3))
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}{language}\n{text}{end}{fence}\n"


def detect_languages(batch: pa.RecordBatch) -> Outcome:
    """The stage that enters the programming language of each file and makes notebooks markdown.

    For rows of domain "code". A language that is entered already stays. Rows without one that no table knows keep
    "und"; broken notebooks go; documents (markdown, notebooks and their like) become domain "reference".
    """
    columns = {name: batch.column(name).to_pylist() for name in ("text", "path", "language", "domain")}
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    for row, (text, path, language, domain) in enumerate(zip(*columns.values(), strict=True)):
        if language == UNKNOWN:
            language = language_of(path, text)
        if language == "notebook":
            try:
                columns["text"][row], language = notebook_markdown(text), "markdown"
            except ValueError as error:
                reasons[row], details[row] = "broken_notebook", str(error)
        columns["language"][row] = language
        columns["domain"][row] = "reference" if domain == "code" and language in PROSE else domain
    batch = with_text(batch, columns["text"])
    for name in ("language", "domain"):
        place = SCHEMA.get_field_index(name)
        batch = batch.set_column(place, SCHEMA.field(name), pa.array(columns[name], pa.string()))
    return Outcome(batch, reasons, details)
