package vaultkv

// Object reads a JSON object. :: name → value as it is written
func Object(text []byte) (map[string][]byte, error) {
	fields, err := object(text)
	out := make(map[string][]byte, len(fields))
	for _, f := range fields {
		out[f.name] = f.value
	}
	return out, err
}
