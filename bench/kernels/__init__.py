"""What the compilers make of every GPU kernel, read from the machine code on any machine.

`python -m bench.kernels` compiles the kernels, describes them and writes the report. It lists none
of them: they are those found in the compiled objects, and their names say which rule, variant and
format they are.
"""
