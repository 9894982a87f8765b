"""Finds the volumes, masks and labels of each dataset and reads them."""
