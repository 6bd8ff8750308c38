"""All faults, and how many of each kind."""

from tests.mutation import cpu_faults, python_faults, shader_faults

FAULTS = (*python_faults.FAULTS, *shader_faults.FAULTS, *cpu_faults.FAULTS)
