package kms

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"kmsd/kms/backup"
	"kmsd/kms/catalog"
)

// BackupFile is a backup and what opens it.
type BackupFile struct {
	// Open reads the file from its beginning. It is called more than once.
	Open func() (io.ReadCloser, error)
	// Identities are those that may open it.
	Identities []age.Identity
	// Progress is told, from many goroutines, how much of the work on keys is done. Nil:
	// nobody listens.
	Progress func(done, total int)
}

// atOnce is how many keys one member is given at a time.
const atOnce = 4

// ProveBackup reads a backup to its end and has every key in it proved by an HSM of its
// group: unwrapped, compared by its check value, and let go. No token is changed. The
// configuration's Catalog is not used; members that are away are no error while one of
// each group is there. No other process should use the members meanwhile.
func ProveBackup(ctx context.Context, cfg Config, file BackupFile) (backup.Contents, error) {
	cfg, err := siteConfig(cfg)
	if err != nil {
		return backup.Contents{}, err
	}
	survey, err := file.survey()
	if err != nil {
		return backup.Contents{}, err
	}
	s, err := openSite(ctx, cfg)
	if err != nil {
		return backup.Contents{}, err
	}
	defer s.close()
	if err := s.fits(survey.contents.Header); err != nil {
		return backup.Contents{}, err
	}
	p := file.meter(survey.contents.Versions)
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.SetLimit(atOnce * max(1, s.most()))
	turn := 0
	readErr := file.each(func(v any) error {
		b, ok := v.(backup.Blob)
		if !ok || ctx.Err() != nil {
			return ctx.Err()
		}
		tokens := s.group(survey.groupOf[b.Identity]).tokens
		t := tokens[turn%len(tokens)]
		turn++
		tasks.Go(func() error {
			if err := t.take(ctx, b, true); err != nil {
				return fmt.Errorf("proving a key of the backup: %w", err)
			}
			p.step()
			return nil
		})
		return nil
	})
	if err := tasks.Wait(); err != nil {
		return backup.Contents{}, translate("proving the backup", err)
	}
	return survey.contents, readErr
}

// most is how many members the largest group has that are there.
func (s *site) most() (n int) {
	for _, g := range s.groups {
		n = max(n, len(g.tokens))
	}
	return n
}

// survey is what is known of a backup after it was read to its end once.
type survey struct {
	contents backup.Contents
	groupOf  map[string]string      // :: identity of a living version → its group
	sample   map[string]backup.Blob // :: group → one of its blobs
}

func (f BackupFile) survey() (survey, error) {
	out := survey{groupOf: map[string]string{}, sample: map[string]backup.Blob{}}
	src, err := f.Open()
	if err != nil {
		return survey{}, err
	}
	defer src.Close()
	r, err := backup.NewReader(src, f.Identities...)
	if err != nil {
		return survey{}, err
	}
	for {
		v, err := r.Next()
		if errors.Is(err, io.EOF) {
			out.contents = r.Contents()
			return out, nil
		}
		if err != nil {
			return survey{}, err
		}
		switch v := v.(type) {
		case catalog.Key:
			for _, version := range v.Versions {
				if living(version) {
					out.groupOf[version.Identity] = v.Group
				}
			}
		case backup.Blob:
			out.sample[out.groupOf[v.Identity]] = v
		}
	}
}

// each reads the backup again, up to the first error of fn.
func (f BackupFile) each(fn func(v any) error) error {
	src, err := f.Open()
	if err != nil {
		return err
	}
	defer src.Close()
	r, err := backup.NewReader(src, f.Identities...)
	if err != nil {
		return err
	}
	for {
		v, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = fn(v)
		}
		if err != nil {
			return err
		}
	}
}

// meter counts what is done.
type meter struct {
	total int
	done  atomic.Int64
	tell  func(done, total int)
}

func (f BackupFile) meter(total int) *meter { return &meter{total: total, tell: f.Progress} }

func (m *meter) step() {
	if n := int(m.done.Add(1)); m.tell != nil {
		m.tell(n, m.total)
	}
}
