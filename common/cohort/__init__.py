"""Who is in a study, with which labels: tables, patient splits, subsets."""
