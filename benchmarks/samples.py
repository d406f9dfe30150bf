"""How near the decoded delta of every file of the real libraries comes to what the library computed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from contestants import ROOT, table


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "formats")]
    import test_gguf
    import test_samples

    title = "# Files of the real libraries\n\n"
    if not test_samples.FOLDER.is_dir():
        return f"{title}Skipped: {test_samples.FOLDER} is missing."
    rows = []
    for name in test_samples.found():
        folder = test_samples.FOLDER / name
        if name in test_samples.REFUSED:
            rows.append([name, "", "", "refused: " + test_samples.REFUSED[name].replace(".*", "…")])
            continue
        if name in test_samples.NOT_WEIGHTS:
            rows.append([name, "", "", "named, not decoded: " + test_samples.NOT_WEIGHTS[name]])
            continue
        adapter = test_samples.open_sample(folder)
        families = ", ".join(Counter(e.family.family for e in adapter.entries.values()))
        if name in test_samples.WITHOUT_REFERENCE:
            found = "no reference: " + test_samples.WITHOUT_REFERENCE[name]
        else:
            found = f"{max(test_samples.errors(name, folder).values(), default=0.0):.1e}"
        rows.append([name, adapter.format.name, families, found])
    gguf = Path(test_samples.FOLDER) / "gguf"
    names = sorted([*test_gguf.BOUNDS, "llama_rslora"])
    rows += [[f"gguf/{name}", "gguf", "lora", test_gguf.described(gguf / name)] for name in names]
    rows = [[*row[:3], row[3].replace("0.0e+00", "0, equal to the bit")] for row in rows]
    method = (
        "The largest relative error (Frobenius) of a parameter's delta against what the library itself computed: for "
        "most, in float32. Files in f16 and q8_0 are compared with the factors before they were rounded."
    )
    return f"{title}{method}\n\n{table(['file', 'dialect', 'families', 'largest error'], rows)}"


if __name__ == "__main__":
    print(main())
