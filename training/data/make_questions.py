"""Prints questions with answers of reasoning-gym as JSON lines: `make_questions.py PACKAGES COUNT`, COUNT a family.

A program of its own, run with the folder of packages that it needs; it imports nothing of moec. The families are those
whose questions are short, made in milliseconds, and have an answer that can be compared letter by letter. A family
belongs to one domain, so that no question of `instructions` is met as running text before.

Text for `math` uses the library's own level of arithmetic. Instructions use a level at which a model of ten million
parameters can learn more than their form: few words, few digits, few steps.
"""

import json
import sys
from typing import Any

MATH: dict[str, dict[str, Any]] = {
    "calendar_arithmetic": {}, "chain_sum": {}, "coin_flip": {}, "count_bits": {}, "fraction_simplification": {},
    "gcd": {}, "lcm": {}, "prime_factorization": {}, "time_intervals": {},
}  # fmt: skip
_SUMS = {"operators": ("+", "-"), "max_terms": 2}
INSTRUCTIONS: dict[str, dict[str, Any]] = {
    "aiw": {},
    "basic_arithmetic": {**_SUMS, "max_digits": 2, "allow_parentheses": False, "allow_negation": False},
    "family_relationships": {"min_family_size": 3, "max_family_size": 5},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 9},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 6},
    "number_filtering": {"max_numbers": 4, "max_decimals": 0},
    "rotate_matrix": {"max_n": 3, "max_rotations": 3},
    "simple_equations": {**_SUMS, "max_value": 20, "operators_weights": [0.5, 0.5]},
    "spell_backward": {"max_word_len": 5},
    "syllogism": {},
    "word_sequence_reversal": {"max_words": 5},
}
SEED = 20261


def main() -> None:
    """Equal arguments print equal lines."""
    sys.path.insert(0, sys.argv[1])
    count = int(sys.argv[2])
    import reasoning_gym

    for domain, families in (("math", MATH), ("instructions", INSTRUCTIONS)):
        for family, level in families.items():
            for row in reasoning_gym.create_dataset(family, size=count, seed=SEED, **level):
                question, answer = str(row["question"]).strip(), str(row["answer"]).strip()
                if question and answer:
                    line = {"domain": domain, "family": family, "question": question, "answer": answer}
                    print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
