"""The adversary study: `subject` is measured, `reference` finds the maximum, `rules` are what is compared with it."""
