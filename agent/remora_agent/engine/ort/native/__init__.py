"""The operator's source and, where a C compiler was there, the library made of it."""
