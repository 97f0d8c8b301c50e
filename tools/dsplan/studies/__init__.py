"""The paper's studies, rerun: each gives rows, panels to draw, and sentences that say what holds and what not."""
