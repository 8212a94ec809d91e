"""Stage 2: connections and soft prompt are fitted on cached features."""
