"""The data: records, examples, images and tables as plain functions, without Beam or models."""
