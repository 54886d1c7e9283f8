"""Grades results files and computes the figures of an evaluation."""
