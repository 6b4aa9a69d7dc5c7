"""All entries of the zoo, in the order of the table."""

import dataclasses

import own_models
import transformers_classes
import x_transformers_variants
from entry import Entry


def all_entries() -> list[Entry]:
    variants = [dataclasses.replace(entry, name=f"x-transformers, {entry.name}") for entry in x_transformers_variants.entries()]
    return [*own_models.entries(), *variants, *transformers_classes.entries()]
