package tde

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Finding is a marker that was found in a file.
type Finding struct {
	File   string
	Offset int64 // of the first occurrence, in bytes
	Marker int   // its index
}

// FindPlaintext reads every regular file below dir and returns each marker that it
// finds, once per file. An empty marker is never found. It returns too how many
// bytes it has looked at: a search that has seen nothing proves nothing.
func FindPlaintext(dir string, markers ...[]byte) (found []Finding, searched int64, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !e.Type().IsRegular() {
			return nil
		}
		f, n, err := searchFile(path, markers)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a database that runs has removed it meanwhile
		}
		found, searched = append(found, f...), searched+n
		return err
	})
	if err != nil {
		return nil, searched, fmt.Errorf("searching for plaintext: %w", err)
	}
	return found, searched, nil
}

// searchFile reads the file in pieces; each begins with the end of the one before,
// so that a marker across the border is seen.
func searchFile(path string, markers [][]byte) (found []Finding, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()

	overlap := 0
	for _, m := range markers {
		overlap = max(overlap, len(m)-1)
	}
	done := make([]bool, len(markers))
	piece := make([]byte, overlap+256<<10)
	kept := 0 // bytes at the start of piece that were searched before
	for {
		n, err := io.ReadFull(f, piece[kept:])
		window := piece[:kept+n]
		for i, m := range markers {
			if at := bytes.Index(window, m); at >= 0 && len(m) > 0 && !done[i] {
				done[i] = true
				found = append(found, Finding{File: path, Offset: size - int64(kept) + int64(at), Marker: i})
			}
		}
		size += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return found, size, nil
		case err != nil:
			return nil, size, err
		}
		kept = copy(piece, window[len(window)-overlap:])
	}
}
