"""Trainers with the methods built in, which resume safely and publish well."""
