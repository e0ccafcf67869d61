"""RefLoRA where its theory applies: gradient descent on small problems, as in Figures 1 and 2 of the paper.

    python benchmarks/evidence/theory.py           # runs the experiments: two minutes on one CPU core
    python benchmarks/evidence/theory.py --page    # draws the plots and prints the page's tables from the records

The paper's text states the problems, but its dimensions are not known to us; those in the settings are our choice.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from theory_descent import FACTORIZATION, GAUGE, gauge, matrix_factorization
from theory_regression import REGRESSION, linear_regression

from hf_reflora.report.environment import environment, write_json


RECORDS = Path(__file__).parents[1] / "records" / "evidence" / "theory"
EXPERIMENTS = {
    "matrix_factorization": (matrix_factorization, FACTORIZATION),
    "linear_regression": (linear_regression, REGRESSION),
    "gauge": (gauge, GAUGE),
}


def rounded(value: Any) -> Any:
    """`value` with every float in it rounded to 5 digits: records are to be read and kept in git."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--page", action="store_true", help="draw the plots and print the tables from the records; run nothing"
    )
    if parser.parse_args().page:
        import theory_page

        theory_page.write()
    else:
        torch.set_num_threads(1)
        RECORDS.mkdir(parents=True, exist_ok=True)
        facts = environment(Path(__file__).parent)  # before the records change the repository
        for name, (experiment, settings) in EXPERIMENTS.items():
            begin = time.perf_counter()
            results = experiment(settings)
            seconds = round(time.perf_counter() - begin, 1)
            record = {"settings": settings, **rounded(results), "seconds": seconds, "environment": facts}
            write_json(RECORDS / f"{name}.json", record)
            print(f"{name}: {seconds} s")
