"""Whole models: copies, their record as plain data, their masked reference."""
