package httpapi

import (
	"context"
	"net/http"

	"kmsd/kms/api"
)

// databaseRoutes are the rows of databases, their data keys and their jobs, and of backups.
func databaseRoutes() []*route {
	const get, put, post, del = http.MethodGet, http.MethodPut, http.MethodPost, http.MethodDelete

	create := about(post, "/v1/databases", "database-create", "Make a database and, when there is no key of that name, its master key. A policy must allow it on a key of another name too.")
	create.namesIn = func(c *call, req any) error {
		body := req.(api.CreateDatabaseBody)
		if err := c.setDatabase(body.Name); err != nil || body.Key == "" {
			return err
		}
		return c.setKey(body.Key)
	}

	list := about(get, "/v1/databases", "database-list", "List databases by name. A policy must allow database-list on the prefix; databases that the caller may not list are left out.").
		with(prefixParam, limitParam, afterParam)
	list.subject = "prefix"

	listNamed := aboutDatabase(get, "/keys", "named-list", "List data keys by ID, without plaintext.").with(prefixParam, limitParam, afterParam)
	listNamed.operation = "list"

	job := about(get, "/v1/jobs/{id}", "database-read", "Show how far a job is. It is for those who may read its database.")
	job.foundIn = func(c *call, answer any) error { return c.setDatabase(answer.(api.Job).Database) }

	return []*route{
		on(create, createDatabase),
		on(list, listDatabases),
		on(aboutDatabase(get, "", "database-read", "Show a database."), showDatabase),
		on(aboutDatabase(post, "/rekey", "database-rekey", "Make the next version of the master key and begin a job that wraps every data key under it.").bodyOptional(), rekey),
		on(job, showJob),
		on(listNamed, listNamedKeys),
		on(aboutNamed("put", put, "", "named-put", "Make the first or the next version of a data key; without plaintext an HSM makes it. The answer has no plaintext.").upTo(putBody).bodyOptional(), putNamedKey),
		on(aboutNamed("", get, "", "named-get", "Return a version of a data key with its plaintext.").with(versionParam), getNamedKey),
		on(aboutNamed("", del, "", "named-delete", "Mark the newest version of a data key as deleted."), deleteNamedKey),
		on(aboutNamed("describe", get, "/metadata", "named-list", "Show the newest version of a data key, deleted or not, without its plaintext."), describeNamedKey),
		on(aboutNamed("rotate", post, "/rotate", "named-put", "Make the next version of a data key in an HSM. The answer has no plaintext."), rotateNamedKey),
		on(about(post, "/v1/backup", "backup", "Return all that kmsd remembers and every master key, wrapped under the domain of its group, encrypted to age recipients.").takes(endless), backup),
	}
}

func createDatabase(ctx context.Context, c *call, req api.CreateDatabaseBody) (api.Database, error) {
	c.record.Group, c.record.AllowDegraded = clip(req.Group), req.AllowDegraded
	return c.service.CreateDatabase(ctx, req.Name, req.DatabaseOptions)
}

func listDatabases(ctx context.Context, c *call, _ none) (api.DatabasePage, error) {
	opts, err := c.page()
	if err != nil {
		return api.DatabasePage{}, err
	}
	page, err := c.service.Databases(ctx, opts)
	if err != nil {
		return api.DatabasePage{}, err
	}
	allowed := make([]api.Database, 0, len(page.Databases))
	for _, d := range page.Databases {
		if c.may(c.record.Action, d.Name) {
			allowed = append(allowed, d)
		}
	}
	page.Databases = allowed
	return page, nil
}

func showDatabase(ctx context.Context, c *call, _ none) (api.Database, error) {
	return c.service.Database(ctx, c.record.Database)
}

// rekey tells the audit log what is to become of old versions, as the operation.
func rekey(ctx context.Context, c *call, req api.RekeyOptions) (api.Job, error) {
	c.record.AllowDegraded = req.AllowDegraded
	if req.Retire == api.RetireDisable || req.Retire == api.RetireDestroy { // no other text gets into the log
		c.record.Operation = string(req.Retire)
	}
	job, err := c.service.Rekey(ctx, c.record.Database, req)
	c.record.Job, c.record.Version = job.ID, job.Version
	return job, err
}

func showJob(ctx context.Context, c *call, _ none) (api.Job, error) {
	return c.service.Job(ctx, c.request.PathValue("id"))
}

func listNamedKeys(ctx context.Context, c *call, _ none) (api.NamedKeyPage, error) {
	opts, err := c.page()
	if err != nil {
		return api.NamedKeyPage{}, err
	}
	return c.service.NamedKeys(ctx, c.record.Database, opts)
}

func putNamedKey(ctx context.Context, c *call, req api.NamedKeyPut) (api.NamedKey, error) {
	return c.versionOf(c.service.PutNamedKey(ctx, c.record.Database, c.record.NamedKey, req))
}

func rotateNamedKey(ctx context.Context, c *call, _ none) (api.NamedKey, error) {
	return c.versionOf(c.service.RotateNamedKey(ctx, c.record.Database, c.record.NamedKey))
}

func describeNamedKey(ctx context.Context, c *call, _ none) (api.NamedKey, error) {
	return c.versionOf(c.service.DescribeNamedKey(ctx, c.record.Database, c.record.NamedKey))
}

func getNamedKey(ctx context.Context, c *call, _ none) (api.NamedKey, error) {
	version, err := c.version()
	if err != nil {
		return api.NamedKey{}, err
	}
	return c.versionOf(c.service.NamedKey(ctx, c.record.Database, c.record.NamedKey, version))
}

// versionOf tells the audit log the version of a data key.
func (c *call) versionOf(k api.NamedKey, err error) (api.NamedKey, error) {
	if err == nil {
		c.record.Version = k.Version
	}
	return k, err
}

func deleteNamedKey(ctx context.Context, c *call, _ none) (done, error) {
	return done{}, c.service.DeleteNamedKey(ctx, c.record.Database, c.record.NamedKey)
}

// done is the answer of what has nothing to say.
type done struct{}

// page reads the parameters of a list.
func (c *call) page() (api.ListOptions, error) {
	limit, err := c.params.number("limit", 0, api.MaxPage)
	return api.ListOptions{Prefix: c.params.text("prefix"), After: c.params.text("after"), Limit: limit}, err
}
