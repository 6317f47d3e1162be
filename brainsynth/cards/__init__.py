"""What a release says of itself, as documents: cards for people, Croissant and RO-Crate for machines. Pure; no files."""
