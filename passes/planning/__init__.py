"""Which loops: the program, its runs, what they would hold and take. Imports graph/, machine/ and operators/."""
