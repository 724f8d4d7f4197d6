"""A traced fp32 graph → the same graph in another numeric type; the word "precision" ends here."""
