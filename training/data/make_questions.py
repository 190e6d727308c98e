"""Prints questions with answers of reasoning-gym as JSON lines: `make_questions.py PACKAGES COUNT`.

A program of its own, run with the folder of packages that it needs; it imports nothing of moec. The families are those
whose questions are short, made in milliseconds, and have an answer that can be compared letter by letter.
"""

import json
import sys

FAMILIES = (
    "basic_arithmetic", "calendar_arithmetic", "chain_sum", "coin_flip", "count_bits", "family_relationships",
    "fraction_simplification", "gcd", "lcm", "leg_counting", "letter_counting", "number_filtering",
    "sentence_reordering", "simple_equations", "spell_backward", "syllogism", "time_intervals",
    "word_sequence_reversal",
)  # fmt: skip
SEED = 20261


def main() -> None:
    """Equal arguments print equal lines."""
    sys.path.insert(0, sys.argv[1])
    count = int(sys.argv[2])
    import reasoning_gym

    for family in FAMILIES:
        for row in reasoning_gym.create_dataset(family, size=count // len(FAMILIES), seed=SEED):
            question, answer = str(row["question"]).strip(), str(row["answer"]).strip()
            if question and answer:
                print(json.dumps({"family": family, "question": question, "answer": answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
