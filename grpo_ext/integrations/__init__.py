"""Integrations with other trainers, one line each: TRL, Liger, verl, Unsloth, transformers.

The rest of the package does not import these modules. Each module requires the library that it is named after only when
the module is imported or used.
"""
