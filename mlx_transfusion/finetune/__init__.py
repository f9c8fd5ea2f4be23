"""Fine-tuning on little data: adapters beside a frozen model, a user's own pictures, and the memory it takes."""
