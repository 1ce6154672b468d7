"""Which training images are left out: too poor (``quality``), or shown in a test set (``audit``)."""
