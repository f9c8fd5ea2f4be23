"""Model families; one file each. A checkpoint's `model_type` names its file here."""
